"""Create, start, stop and remove 20 tiny VMs at once: whose processor time it takes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from bench.console import LIMIT
from bench.figures import Figure, Section, Series, Unit
from bench.installation import Installation, installation
from bench.processes import clean_environment, cpu_seconds, memory
from undercroft.storage.build.tiny import READY_LINE

_COUNT = 20
_SHARE = 0.10
_READY = READY_LINE.encode()
_CREATE = ("--no-start", "--stop-timeout", "300")  # the machine is overbooked: none is cut short
_STEPS = ("create", "start", "stop", "rm")


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a cycle, and how long it took. ``steps``: of that, by step, what the
    daemon used (only where the steps do not overlap)."""

    qemu: float
    daemon: float
    commands: float
    took: float
    steps: dict[str, float]

    @property
    def share(self) -> float:
        """Ours, of all."""
        ours = self.daemon + self.commands
        return ours / (ours + self.qemu)


class Commands:
    """Runs croft, and adds up what its processes use."""

    def __init__(self, ours: Installation) -> None:
        self.seconds = 0.0
        self._ours = ours
        self._lock = threading.Lock()

    def run(self, *words: str) -> None:
        """Runs croft with these words to its end.

        Raises:
            RuntimeError: it failed.
        """
        argv = self._ours.command("--quiet", *words)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
            pid = os.posix_spawn(argv[0], argv, clean_environment(), file_actions=actions)
        finally:
            os.close(null)
        _, status, usage = os.wait4(pid, 0)
        with self._lock:
            self.seconds += usage.ru_utime + usage.ru_stime
        if status:
            raise RuntimeError(f"croft {' '.join(words)} failed")


def run(directory: Path, runs: int) -> list[Section]:
    """Cycles of both kinds in turn: a command per VM and step, and one command for all VMs."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(installation(directory / "cycle"))
        ours.start_daemon()
        ours.image()
        names = [f"cycle-{number:02}" for number in range(_COUNT)]
        each: list[Cost] = []
        together: list[Cost] = []
        for _ in range(runs):
            each.append(_measure(ours, names, _each))
            together.append(_measure(ours, names, _together))
        resident = memory(ours.pid)[0]
    return [_section(each, together, resident)]


def _measure(
    ours: Installation,
    names: Sequence[str],
    cycle: Callable[[Installation, Commands, Sequence[str]], dict[str, float]],
) -> Cost:
    commands = Commands(ours)
    own, reaped = cpu_seconds(ours.pid)
    began = time.perf_counter()
    steps = cycle(ours, commands, names)
    took = time.perf_counter() - began
    own_after, reaped_after = cpu_seconds(ours.pid)
    # The daemon is the parent of the QEMUs: what they used is in what it has waited for.
    return Cost(reaped_after - reaped, own_after - own, commands.seconds, took, steps)


def _each(ours: Installation, commands: Commands, names: Sequence[str]) -> dict[str, float]:
    def one(name: str) -> None:
        commands.run("run", "tiny", "--name", name, "--network", "restricted", *_CREATE)
        commands.run("start", name)
        _wait_ready(ours, name)
        commands.run("stop", name)
        commands.run("rm", name)

    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(one, names))
    return {}


def _together(ours: Installation, commands: Commands, names: Sequence[str]) -> dict[str, float]:
    def create(name: str) -> None:
        commands.run("run", "tiny", "--name", name, "--network", "restricted", *_CREATE)

    steps = {}
    before = cpu_seconds(ours.pid)[0]
    with ThreadPoolExecutor(len(names)) as pool:
        for step in _STEPS:
            if step == "create":
                list(pool.map(create, names))
            else:
                commands.run(step, *names)
            if step == "start":
                list(pool.map(lambda name: _wait_ready(ours, name), names))
            after = cpu_seconds(ours.pid)[0]
            steps[step] = after - before
            before = after
    return steps


def _wait_ready(ours: Installation, name: str) -> None:
    """Waits for the guest's line, in the file that the daemon keeps of its console: asking the
    API would be our cost, not a user's."""
    path = ours.data / "vms" / _id_of(ours, name) / "console.log"
    deadline = time.monotonic() + LIMIT
    while not (path.exists() and _READY in path.read_bytes()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{name} is not up")
        time.sleep(0.2)


def _id_of(ours: Installation, name: str) -> str:
    with ours.client as client:
        return client.vms.get(name).meta.id


def _section(each: Sequence[Cost], together: Sequence[Cost], resident: int) -> Section:
    def figure(what: str, costs: Sequence[Cost], must: bool) -> Figure:
        shares = Series(tuple(cost.share for cost in costs))
        reached = shares.median <= _SHARE if must else None
        return Figure(what, f"≤ {_SHARE * 100:.0f} %" if must else "", shares, Unit.SHARE, reached)

    rows = [
        "| | QEMU | daemon | commands | took |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, costs in (("a command per VM and step", each), ("one command for all", together)):
        cells = [
            Series(tuple(getattr(cost, part) for cost in costs)).text(Unit.SECONDS)
            for part in ("qemu", "daemon", "commands", "took")
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    steps = ", ".join(
        f"{step} {Unit.SECONDS.text(Series(tuple(c.steps[step] for c in together)).median)}"
        for step in _STEPS
    )
    return Section(
        "cycle",
        f"Create, start, stop and remove {_COUNT} tiny VMs at once",
        "Undercroft's share of all processor time (user and system): the daemon's own and that of "
        "every `croft` process, beside what the QEMUs used from start to end. Each VM is stopped "
        "when its userspace is up.",
        [
            figure("share, one command for all VMs (`croft start A B …`)", together, True),
            figure("share, 80 commands: one per VM and step, all VMs at once", each, True),
        ],
        "",
        [
            "\n".join(rows),
            f"The daemon's part with one command for all, by step: {steps}. "
            f"After all cycles it had {Unit.BYTES.text(resident)} resident.",
        ],
    )
