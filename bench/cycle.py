"""Create, start, stop and remove 20 tiny VMs at once: whose processor time it takes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
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
    """Runs croft, for several VMs at once, and adds up what its processes use."""

    def __init__(self, ours: Installation) -> None:
        self.seconds = 0.0
        self._ours = ours
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._ended = threading.Event()

    def run(self, *words: str) -> None:
        """Runs croft with these words to its end.

        Raises:
            RuntimeError: it failed, or all has been given up.
        """
        argv = self._ours.command("--quiet", *words)
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            actions = [(os.POSIX_SPAWN_DUP2, null, 0), (os.POSIX_SPAWN_DUP2, null, 1)]
            with self._lock:
                if self._ended.is_set():
                    raise RuntimeError("given up")
                pid = os.posix_spawn(argv[0], argv, clean_environment(), file_actions=actions)
                self._running.add(pid)
        finally:
            os.close(null)
        _, status, usage = os.wait4(pid, 0)
        with self._lock:
            self._running.discard(pid)
            self.seconds += usage.ru_utime + usage.ru_stime
        if status:
            raise RuntimeError(f"croft {' '.join(words)} failed")

    def for_all(self, action: Callable[[str], None], names: Sequence[str]) -> None:
        """Does something for all names at once. What fails, or Ctrl-C, ends the others too."""
        with ThreadPoolExecutor(len(names)) as pool:
            try:
                for outcome in as_completed([pool.submit(action, name) for name in names]):
                    outcome.result()
            except BaseException:
                self._give_up()
                raise

    def _give_up(self) -> None:
        with self._lock:
            self._ended.set()
            for pid in self._running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait_ready(self, name: str) -> None:
        """Waits for the guest's line, in the file that the daemon keeps of its console: asking
        the API all the time would be our cost, not a user's.

        Raises:
            RuntimeError: it has not come, or all has been given up.
        """
        with self._ours.client as client:
            path = self._ours.data / "vms" / client.vms.get(name).meta.id / "console.log"
        deadline = time.monotonic() + LIMIT
        while not (path.exists() and _READY in path.read_bytes()):
            if self._ended.wait(0.2) or time.monotonic() > deadline:
                raise RuntimeError(f"{name} is not up")


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
        commands.wait_ready(name)
        commands.run("stop", name)
        commands.run("rm", name)

    commands.for_all(one, names)
    return {}


def _together(ours: Installation, commands: Commands, names: Sequence[str]) -> dict[str, float]:
    def create(name: str) -> None:
        commands.run("run", "tiny", "--name", name, "--network", "restricted", *_CREATE)

    steps = {}
    before = cpu_seconds(ours.pid)[0]
    for step in _STEPS:
        if step == "create":
            commands.for_all(create, names)
        else:
            commands.run(step, *names)
        if step == "start":
            commands.for_all(commands.wait_ready, names)
        after = cpu_seconds(ours.pid)[0]
        steps[step] = after - before
        before = after
    return steps


def _section(each: Sequence[Cost], together: Sequence[Cost], resident: int) -> Section:
    def figure(what: str, costs: Sequence[Cost]) -> Figure:
        shares = Series(tuple(cost.share for cost in costs))
        return Figure(what, f"≤ {_SHARE * 100:.0f} %", shares, Unit.SHARE, shares.median <= _SHARE)

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
            figure("share, one command for all VMs (`croft start A B …`)", together),
            figure("share, 80 commands: one per VM and step, all VMs at once", each),
        ],
        "",
        [
            "\n".join(rows),
            f"The daemon's part with one command for all, by step: {steps}. "
            f"After all cycles it had {Unit.BYTES.text(resident)} resident.",
        ],
    )
