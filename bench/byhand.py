"""QEMU started by hand: the very command line that Undercroft started a VM with."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from pathlib import Path

from bench.console import Listener
from bench.processes import cpu_seconds
from undercroft.hypervisor.commandline import CommandLine, command_line
from undercroft.hypervisor.emulator import find_emulator
from undercroft.hypervisor.launch import read_plan
from undercroft.hypervisor.line import HandleKind
from undercroft.hypervisor.plan import MachinePlan


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
        with contextlib.ExitStack() as stack:
            numbers: dict[str, int] = {}
            console: Listener | None = None
            for handle in self.line.handles:
                if handle.kind is HandleKind.LISTEN:
                    listener = stack.enter_context(Listener(self._directory / handle.name))
                    numbers[handle.name] = listener.socket.fileno()
                    if handle.name == "serial":
                        console = listener
                        listener.connect()
                else:
                    numbers[handle.name] = os.open(handle.path, os.O_RDONLY)
                    stack.callback(os.close, numbers[handle.name])
            assert console is not None
            argv = self.line.with_descriptors(numbers)
            began = time.perf_counter()
            process = subprocess.Popen(
                argv,
                pass_fds=tuple(numbers.values()),
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                took = console.wait_for(ready) - began
                cpu.append(cpu_seconds(process.pid)[0])
                return took
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
