"""QEMU started by hand: the very command line that Undercroft started a VM with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.console import Listener
from bench.processes import cpu_seconds
from undercroft.hypervisor.commandline import CommandLine, command_line
from undercroft.hypervisor.emulator import find_emulator
from undercroft.hypervisor.launch import read_plan
from undercroft.hypervisor.line import HandleKind
from undercroft.hypervisor.plan import MachinePlan


@dataclass(frozen=True)
class Running:
    """A QEMU, its sockets by name, and when it was executed (`time.perf_counter`)."""

    process: subprocess.Popen[bytes]
    sockets: Mapping[str, Listener]
    began: float


class ByHand:
    """A command line and the plan that it is of.

    The files it reads and the sockets it serves are handed over as descriptors, as the line wants
    it; they are opened before the time counts.
    """

    def __init__(self, plan: MachinePlan, line: CommandLine, directory: Path) -> None:
        self.plan = plan
        self.line = line
        self._directory = directory

    @classmethod
    def of(cls, run_directory: Path, pid: int, directory: Path) -> ByHand:
        """The line of the running QEMU with this pid and run directory; ``directory`` is for our
        own sockets.

        Raises:
            RuntimeError: what we would start is not what runs there.
        """
        plan = read_plan(run_directory)
        line = command_line(plan, asyncio.run(find_emulator(plan.arch)))
        running = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
        if not same_line(line, [argument.decode() for argument in running]):
            raise RuntimeError(f"the QEMU with pid {pid} has another command line than its plan")
        return cls(plan, line, directory)

    def start(self, ready: bytes, cpu: list[float]) -> float:
        """Seconds from executing QEMU to the line on its console; what processor time QEMU had
        used by then is added to ``cpu``. It is gone again afterwards."""
        with self.running("serial") as running:
            took = running.sockets["serial"].wait_for(ready) - running.began
            cpu.append(cpu_seconds(running.process.pid)[0])
            return took

    @contextlib.contextmanager
    def running(self, *early: str, directory: Path | None = None) -> Iterator[Running]:
        """QEMU, executed, for as long as the context lasts. We are the client of the ``early`` ones
        of its sockets already; ``directory``: for these, if it is not the only one."""
        place = directory or self._directory
        with contextlib.ExitStack() as stack:
            numbers: dict[str, int] = {}
            listeners: dict[str, Listener] = {}
            for handle in self.line.handles:
                if handle.kind is HandleKind.LISTEN:
                    listener = stack.enter_context(Listener(place / handle.name))
                    listeners[handle.name] = listener
                    numbers[handle.name] = listener.socket.fileno()
                    if handle.name in early:
                        listener.connect()
                else:
                    access = os.O_RDWR if handle.kind is HandleKind.WRITE else os.O_RDONLY
                    numbers[handle.name] = os.open(handle.path, access)
                    stack.callback(os.close, numbers[handle.name])
            argv = self.line.with_descriptors(numbers)
            began = time.perf_counter()
            process = subprocess.Popen(
                argv,
                pass_fds=tuple(numbers.values()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                yield Running(process, listeners, began)
            finally:
                process.kill()
                process.wait()


def same_line(line: CommandLine, running: list[str]) -> bool:
    """Whether a running QEMU's arguments are those of the line, whatever its descriptors are."""
    if len(running) != len(line.argv):
        return False
    tokens = [handle.token for handle in line.handles]
    for ours, theirs in zip(line.argv, running, strict=True):
        for token in tokens:
            if token in ours:
                before, _, after = ours.partition(token)
                number = theirs.removeprefix(before).removesuffix(after)
                if not number.isdigit():
                    return False
                ours = before + number + after
        if ours != theirs:
            return False
    return True
