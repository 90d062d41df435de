"""Harmless processes that look like emulators of a data directory."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from undercroft.hypervisor.process import MARK


class Emulators:
    """Starts them, and ends them all."""

    def __init__(self, directory: Path) -> None:
        self._program = directory / "qemu-system-test"
        shutil.copy(shutil.which("sleep") or "/bin/sleep", self._program)
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, mark: Path | None, program: Path | None = None) -> int:
        """The pid of a new one that is marked with the directory of its VM."""
        environ = {} if mark is None else {MARK: str(mark)}
        process = subprocess.Popen([program or self._program, "600"], env=environ)
        self._started.append(process)
        # It has begun a moment before the kernel knows where its environment is.
        while not Path("/proc", str(process.pid), "cmdline").read_bytes():
            time.sleep(0.001)
        return process.pid

    def lives(self, pid: int) -> bool:
        """Whether it still runs."""
        (process,) = (p for p in self._started if p.pid == pid)
        return process.poll() is None

    def stop(self) -> None:
        """Ends them all."""
        for process in self._started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, 9)
            process.wait()


@contextlib.contextmanager
def emulators(directory: Path) -> Iterator[Emulators]:
    """They end with the block."""
    made = Emulators(directory)
    try:
        yield made
    finally:
        made.stop()
