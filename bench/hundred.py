"""A hundred instant clones at once: how long until all answer, beside the least that QEMU by hand
needs for it; and what they take in memory, beside VMs that booted by themselves."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.byhand import ByHand
from bench.figures import Figure, Section, Series, Unit
from bench.forks import AT_ONCE, Forks, forks, table
from bench.guests import SOURCE, TEMPLATE, Guests, check_name
from bench.installation import Installation, installation
from bench.processes import cpu_seconds, memory, private_memory, timed, used_seconds
from undercroft.client.client import Client
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import VM
from undercroft.storage.build.tiny import READY_LINE

_COUNT = 100
_ALL = 8.0  # seconds
_EACH = 25 * MiB
_SHAPE = ("--memory", "256M", "--network", "restricted")
_IDLE = 10.0  # seconds, after which memory is looked at
_ASKED = 45.0  # seconds, after which the daemon has asked each guest for its addresses
_BOOTED = 2  # VMs
_ANSWERS = 3  # clones whose guests are asked for their name once more


@dataclass(frozen=True)
class Ours:
    """What a hundred clones took, in seconds: altogether, and of processor time by a QEMU on
    average, the daemon and the command."""

    took: float
    qemu: float
    daemon: float
    command: float


@dataclass(frozen=True)
class Memory:
    """What idle VMs take: the proportional shares (PSS) of all, the bytes that one has to itself
    and those that they share among themselves."""

    shares: tuple[int, ...]
    private: float
    shared: float

    @classmethod
    def of(cls, pids: Sequence[int]) -> Memory:
        """Of processes that are the only ones which share with each other."""
        shares = tuple(memory(pid)[1] for pid in pids)
        private = [private_memory(pid) for pid in pids]
        return cls(shares, statistics.fmean(private), sum(shares) - sum(private))

    def fit(self, room: float) -> int:
        """How many fit into so many bytes."""
        return max(int((room - self.shared) // self.private), 0)


def run(directory: Path, runs: int) -> list[Section]:
    """A hundred by `croft clone`, a hundred by hand, in turn."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "hundred"))
        ours.start_daemon()
        ours.image()
        client = stack.enter_context(ours.client)
        guests = Guests(ours, client, "tiny", _SHAPE)
        guests.source()
        by_hand = _learn(ours, client, directory)
        mine: list[Ours] = []
        theirs: list[Forks] = []
        idle: list[Memory] = []
        for _ in range(runs):
            with _clones(ours, client) as (one, pids):
                mine.append(one)
                if not idle:
                    time.sleep(_IDLE)
                    idle.append(Memory.of(pids))
                    time.sleep(_ASKED - _IDLE)
                    idle.append(Memory.of(pids))
            with forks(by_hand, directory, SOURCE, _COUNT) as floor:
                theirs.append(floor)
        ours.croft("rm", "--force", SOURCE)
        booted = Memory.of(_booted(stack, ours, client, directory))
    return [_time(mine, theirs), _memory(idle[0], idle[1], booted)]


def _learn(ours: Installation, client: Client, directory: Path) -> ByHand:
    """The command line of a clone. It stays: its files and directories are used again."""
    ours.croft("clone", TEMPLATE, "model")
    return _by_hand(ours, client.vms.get("model"), directory)


def _by_hand(ours: Installation, vm: VM, directory: Path) -> ByHand:
    assert vm.status.instance is not None
    return ByHand.of(ours.data / "run/vms" / vm.meta.id, vm.status.instance.pid, directory)


@contextlib.contextmanager
def _clones(ours: Installation, client: Client) -> Iterator[tuple[Ours, list[int]]]:
    """A hundred clones, all of which have answered, and the pids of their QEMUs."""
    daemon = cpu_seconds(ours.pid)[0]
    command: list[float] = []
    took = timed(
        ours.command("--quiet", "clone", TEMPLATE, "--count", str(_COUNT)), command, timeout=600.0
    )
    daemon = cpu_seconds(ours.pid)[0] - daemon
    vms = client.vms.list(f"meta.name~{TEMPLATE}-*")
    try:
        pids = [vm.status.instance.pid for vm in vms if vm.status.instance is not None]
        if len(pids) != _COUNT or not all(vm.status.agent for vm in vms):
            raise RuntimeError(f"of {_COUNT} clones {len(pids)} run, and not all answer")
        qemu = statistics.fmean(used_seconds(pid) for pid in pids)
        for vm in vms[:: _COUNT // _ANSWERS]:
            check_name(client, vm.meta.name)
        yield Ours(took, qemu, daemon, command[0]), pids
    finally:
        ours.croft("rm", "--force", *(vm.meta.name for vm in vms))


def _booted(
    stack: contextlib.ExitStack, ours: Installation, client: Client, directory: Path
) -> list[int]:
    """The pids of QEMUs by hand that booted the same image, and are idle."""
    ours.croft("run", "tiny", "--cold", "--name", "booted", *_SHAPE)
    by_hand = _by_hand(ours, client.vms.get("booted"), directory)
    ours.croft("rm", "--force", "booted", "model")
    pids = []
    for number in range(_BOOTED):
        place = directory / f"booted-{number}"
        place.mkdir()
        running = stack.enter_context(by_hand.running("serial", directory=place))
        running.sockets["serial"].wait_for(READY_LINE.encode())
        pids.append(running.process.pid)
    time.sleep(_IDLE)
    return pids


def _time(mine: Sequence[Ours], theirs: Sequence[Forks]) -> Section:
    took = Series(tuple(one.took for one in mine))
    figures = [
        Figure(
            f"{_COUNT} instant clones, all answering",
            f"≤ {_ALL:.0f} s",
            took,
            Unit.SECONDS,
            took.median <= _ALL,
            Series(tuple(one.took for one in theirs)),
        ),
        Figure(
            "of that, processor time of each QEMU",
            "",
            Series(tuple(one.qemu for one in mine)),
            Unit.SECONDS,
            None,
            Series(tuple(one.cpu for one in theirs)),
        ),
        *(
            Figure(f"of that, processor time of the {name}", "", series, Unit.SECONDS, None)
            for name, series in (
                ("daemon", Series(tuple(one.daemon for one in mine))),
                ("command", Series(tuple(one.command for one in mine))),
            )
        ),
    ]
    return Section(
        "hundred",
        f"{_COUNT} instant clones of a tiny VM with 256 MB",
        f"`croft clone {TEMPLATE} --count {_COUNT}`, from executing it to its exit, when the "
        "agents of all guests have answered with their new names; none is held ready. By hand "
        f"{_COUNT} QEMUs with the same command line load the same state, {AT_ONCE} at a time, "
        "until the agents of all have answered with the old name: nothing makes them others, and "
        "nobody writes anything down. That is the floor.",
        figures,
        "QEMU by hand",
        [
            table([parts for floor in theirs for parts in floor.parts]),
            "Medians by hand, each while others are under way. Most of the first part are dynamic "
            "linking and relocation, and building the board's devices, memory map and ACPI tables, "
            "each page of which is touched for the first time; of the third, translating the code "
            "of the guest's kernel and agent, of which an emulator has nothing when it begins. "
            "Ours has on top what makes the guest another one (system calls in it, whose code is "
            "translated, too), and the daemon.",
        ],
    )


def _memory(idle: Memory, asked: Memory, booted: Memory) -> Section:
    fit, plain = idle.fit(2 * GiB), booted.fit(2 * GiB)
    text = Unit.BYTES.text
    ours, later, theirs = (
        Series(tuple(float(share) for share in found.shares)) for found in (idle, asked, booted)
    )
    must = f"≤ {_EACH // MiB} MiB ({text(_EACH)})"
    reached = ours.median <= _EACH
    return Section(
        "hundred",
        f"Memory of {_COUNT} idle instant clones",
        f"The proportional share (PSS) of each QEMU, {_IDLE:.0f} s after all had answered; the "
        f"daemon asks each guest for its addresses twice a minute. By hand {_BOOTED} QEMUs that "
        f"booted the same image, {_IDLE:.0f} s afterwards.",
        [
            Figure("memory of an idle clone", must, ours, Unit.BYTES, reached, theirs),
            Figure(
                f"the same after {_ASKED:.0f} s, when all were asked",
                "",
                later,
                Unit.BYTES,
                None,
                theirs,
            ),
        ],
        "booted by hand",
        [
            f"Into 2 GiB fit {fit} clones ({text(idle.private)} of its own each, and "
            f"{text(idle.shared)} that they share), or {plain} that booted by themselves "
            f"({text(booted.private)} each)."
        ],
    )
