"""Space that is taken in advance, so that a full disk does not lock its owner out.

Somebody whose disk was filled by guests wants to start the daemon and remove VMs, and both need the
store. SQLite writes its log over and over from the beginning: with the space for a full log taken,
small transactions go through for a while. The log is gone while the store is closed, so a file
beside it holds its place. A little of that stays while the store is open, too: after a crash SQLite
needs a new shared-memory file before it can look at anything.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

WAL_PAGES = 1000  # SQLite's own default: it checkpoints when the log is this long
_PAGE = 4096
_LOG = WAL_PAGES * (_PAGE + 24) + 32  # https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_OPENING = 256 << 10


class Reserve:
    """The file ``<store>-reserve``. Whatever fails here fails silently: the disk is full then, or
    such that it cannot be helped."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + "-reserve")
        self._log = path.with_name(path.name + "-wal")

    def make_way(self) -> None:
        """Before opening: frees what the log is to have."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_size > _OPENING:
                os.truncate(self._path, _OPENING)

    def give_up(self) -> bool:
        """When opening failed for want of space: frees everything; whether there was something."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True

    def take_log(self) -> None:
        """After opening: takes the space for a full log.

        Zeros behind the end of the log mean nothing to SQLite: their checksums do not match. It
        holds no locks on this file either, so opening it beside SQLite is harmless.
        """
        _allocate(self._log, _LOG, os.O_RDWR)
        self.take(_OPENING)

    def close(self) -> None:
        """After closing: holds the place of the log, unless it is still there."""
        if not self._log.exists():
            self.take(_LOG + _OPENING)

    def take(self, size: int) -> None:
        """Makes the reserve so large (bytes)."""
        if not _allocate(self._path, size, os.O_RDWR | os.O_CREAT):
            _allocate(self._path, _OPENING, os.O_RDWR | os.O_CREAT)


def _allocate(path: Path, size: int, flags: int) -> bool:
    try:
        fd = os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
