"""Space that is taken in advance, so that a full disk does not lock its owner out.

Somebody whose disk was filled by guests wants to start the daemon and remove VMs, and both need the
store. SQLite writes its log over and over from the beginning: with the space for a full log taken,
small transactions go through for a while. The log is gone while the store is closed, so a file
beside it holds its place. Some of that stays while the store is open, too: after a crash SQLite
needs a new shared-memory file before it can look at anything, and when the log has come to its end,
what it holds must find room in the database before it can begin anew.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

WAL_PAGES = 1000  # SQLite's own default: it checkpoints when the log is this long
_PAGE = 4096
_LOG = WAL_PAGES * (_PAGE + 24) + 32  # https://www.sqlite.org/fileformat2.html#the_write_ahead_log
_OPENING = 256 << 10
_LEAST = 32 << 10
_GROWTH = 2 << 20  # of the database by what a full log holds


class Reserve:
    """The file ``<store>-reserve``. Whatever fails here fails silently: the disk is full then, or
    such that it cannot be helped."""

    def __init__(self, path: Path) -> None:
        self._path = path.with_name(path.name + "-reserve")
        self._log = path.with_name(path.name + "-wal")

    def make_way(self) -> bool:
        """Frees what the log is to have (before opening), or the database is to grow by; whether
        there was something."""
        with contextlib.suppress(OSError):
            if self._path.stat().st_size > _OPENING:
                os.truncate(self._path, _OPENING)
                return True
        return False

    def give_up(self) -> bool:
        """When opening failed for want of space: frees half, as the first checkpoint takes all
        that it finds, and this may not be the last time; whether there was something."""
        try:
            half = self._path.stat().st_size // 2
            if half < _LEAST:
                self._path.unlink()
            else:
                os.truncate(self._path, half)
        except OSError:
            return False
        return True

    def take_log(self) -> None:
        """After opening: takes the space for a full log.

        Zeros behind the end of the log mean nothing to SQLite: their checksums do not match. It
        holds no locks on this file either, so opening it beside SQLite is harmless.
        """
        _allocate(self._log, _LOG, os.O_RDWR)
        self.take_growth()

    def take_growth(self) -> bool:
        """While it is open: takes what the database may have to grow by; whether it is there."""
        return self._take(_GROWTH + _OPENING)

    def close(self) -> None:
        """After closing: holds the place of the log, unless it is still there."""
        if not self._log.exists():
            self._take(_LOG + _GROWTH + _OPENING)

    def _take(self, size: int) -> bool:
        """Makes the reserve so large, or as large as it can be without; whether it is."""
        part = size
        while not _allocate(self._path, part, os.O_RDWR | os.O_CREAT):
            part = min(part // 2, _OPENING)
            if part < _LEAST:
                return False
        return part == size


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
