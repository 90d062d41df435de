"""What QEMU itself says on stdout and stderr: read from its FIFO into a bounded log."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from pathlib import Path

from undercroft.hypervisor.log import BoundedLog
from undercroft.hypervisor.plan import MachinePlan

__all__ = ["QEMU_LOG", "OutputLog"]

QEMU_LOG = "qemu.log"

_READ = 16 << 10
_PACE = 0.1  # seconds between two reads: QEMU has little to say, unless its guest makes it
_KEPT_LINES = 20
_LINE = 500
_WAITING = "info: QEMU waiting for connection"  # said at every start


class OutputLog:
    """Follows QEMU's output. ``last_words`` are what it said since we have been listening."""

    def __init__(self, descriptor: int, directory: Path, limit: int) -> None:
        """Takes over the reading end of the FIFO (`launch.open_output`)."""
        self._descriptor = descriptor
        self._log = BoundedLog(directory / QEMU_LOG, limit)
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._partial = ""
        self._paused: asyncio.TimerHandle | None = None
        asyncio.get_running_loop().add_reader(descriptor, self._on_readable)

    @classmethod
    def of(cls, descriptor: int, plan: MachinePlan) -> OutputLog:
        """The log of a VM."""
        return cls(descriptor, Path(plan.directory), plan.logs.qemu)

    @property
    def last_words(self) -> str:
        """The last lines, without time stamps and program name."""
        lines = [*self._lines, self._partial] if self._partial else [*self._lines]
        return "\n".join(_plain(line) for line in lines if line.strip() and _WAITING not in line)

    def _on_readable(self) -> None:
        loop = asyncio.get_running_loop()
        ended = not self._read_once()
        loop.remove_reader(self._descriptor)
        if not ended:
            self._paused = loop.call_later(_PACE, self._go_on)

    def _go_on(self) -> None:
        self._paused = None
        if self._descriptor >= 0:
            asyncio.get_running_loop().add_reader(self._descriptor, self._on_readable)

    def _read_once(self) -> bool:
        """Takes what is there; False at the end."""
        try:
            data = os.read(self._descriptor, _READ)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._log.write(data)
        *lines, self._partial = (self._partial + data.decode(errors="replace")).split("\n")
        self._lines.extend(line[:_LINE] for line in lines)
        self._partial = self._partial[:_LINE]
        return True

    def finish(self) -> None:
        """Takes the rest that is in the FIFO, once QEMU has ended, and closes."""
        if self._descriptor < 0:
            return
        for _ in range(64):
            try:
                more = self._read_once()
            except OSError:
                break
            if not more:
                break
        self.close()

    def close(self) -> None:
        """Stops following; QEMU may go on talking."""
        if self._descriptor < 0:
            return
        asyncio.get_running_loop().remove_reader(self._descriptor)
        if self._paused is not None:
            self._paused.cancel()
        os.close(self._descriptor)
        self._descriptor = -1
        self._log.close()


def _plain(line: str) -> str:
    """``2026-01-01T00:00:00.000000Z qemu-system-x86_64: text`` without what is not news."""
    _, found, text = line.partition(": ")
    head = line[: -len(text)] if found else ""
    if found and "qemu-system" in head:
        line = text
    return line.strip()
