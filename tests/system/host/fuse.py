"""What goes wrong in the middle of things: after a number of steps the daemon dies as if by
kill -9, all QEMUs do, or the disk has no room left.

A step is what comes before a file is opened or renamed, a program or a connection begun, and before
each thing that was awaited goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis.strategies as st

from undercroft.host import orphans

KILLED = 137
_STEPS = (
    "open",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.truncate",
    "shutil.copytree",
    "shutil.rmtree",
    "socket.connect",
    "subprocess.Popen",
)


class Victim(enum.StrEnum):
    """Whom it hits."""

    DAEMON = "daemon"
    QEMU = "qemu"
    DISK = "disk"


class Trouble(NamedTuple):
    """What happens after so many steps (0: nothing), and to the next daemon if the first died."""

    steps: int = 0
    again: int = 0
    victim: Victim = Victim.DAEMON


NONE = Trouble()


def troubles(*steps: st.SearchStrategy[int]) -> st.SearchStrategy[Trouble]:
    """Any trouble, after a number of steps from one of these."""
    some = st.one_of(*steps)
    victims = st.sampled_from(Victim if os.geteuid() == 0 else [Victim.DAEMON, Victim.QEMU])
    return st.builds(Trouble, some, some, victims)


class Fuse:
    """Counts the steps of this process, and has it happen."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._left = 0
        self._victim = Victim.DAEMON
        self._filler = data / "cache" / "filler"
        self._filling = threading.Lock()
        self._over = False
        self.blown = False
        sys.addaudithook(self._on_audit)
        run_handle = asyncio.Handle._run

        def counted(handle: Any) -> None:
            self._count()
            run_handle(handle)

        setattr(asyncio.Handle, "_run", counted)  # noqa: B010

    def set(self, steps: int, victim: Victim) -> None:
        """It happens after so many steps from now; 0: never."""
        self.blown = self._over = False
        self._victim, self._left = victim, steps

    def clear(self) -> None:
        """It does not happen any more; there is room again."""
        self._left = 0
        with self._filling:
            self._over = True
            self._filler.unlink(missing_ok=True)

    def _on_audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._left and event in _STEPS:
            self._count()

    def _count(self) -> None:
        if self._left:
            self._left -= 1
            if not self._left:
                self.blown = True
                _BLOWS[self._victim](self)

    def _end_daemon(self) -> None:
        os._exit(KILLED)

    def _end_emulators(self) -> None:
        for pid in orphans.marked_processes(self._data):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _fill(self) -> None:
        with self._filling:
            if not self._over:
                fill(self._filler)


_BLOWS: dict[Victim, Callable[[Fuse], None]] = {
    Victim.DAEMON: Fuse._end_daemon,
    Victim.QEMU: Fuse._end_emulators,
    Victim.DISK: Fuse._fill,
}


def fill(filler: Path, leave: int = 0) -> None:
    """Takes all room of the disk that a file is to be on but ``leave`` bytes."""
    with filler.open("wb") as file:
        at, most = 0, 1 << 40
        while most >= 4096:
            usage = os.statvfs(filler.parent)
            most = min(most, usage.f_bavail * usage.f_frsize - leave) // 4096 * 4096
            if most <= 0:
                break
            try:
                os.posix_fallocate(file.fileno(), at, most)
                at += most
            except OSError:  # somebody was quicker
                most //= 2


def small_disk(place: Path, size: int) -> Path:
    """A directory on a disk of so many bytes of its own; where that cannot be, only a directory."""
    path = place / "disk"
    path.mkdir(mode=0o711)
    if os.geteuid() == 0:
        options = f"size={size},mode=711"
        command = ["mount", "-t", "tmpfs", "-o", options, "croft", str(path)]
        subprocess.run(command, check=True)
    return path


def remove_disk(path: Path) -> None:
    """Removes it again."""
    if os.path.ismount(path):
        subprocess.run(["umount", "--lazy", str(path)], check=True)
