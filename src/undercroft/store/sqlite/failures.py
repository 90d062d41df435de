"""What SQLite's errors mean to a user (https://www.sqlite.org/rescode.html)."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from undercroft.model.errors import (
    DataCorruptError,
    DataError,
    UnavailableError,
    UndercroftError,
)
from undercroft.store.os_errors import NOT_WRITABLE, no_space

# With less than this free, a write that failed is put down to the full disk. SQLite tells ENOSPC
# apart itself, but reports an exhausted quota, or no room for the shared-memory file, as I/O error.
FULL = 256 << 10
_PRIMARY = 0xFF  # an extended result code carries the primary one in its lowest byte

RESTORE = (
    "stop the daemon and put back {name}.bak-* or a backup of your own; without one, move {name} "
    "away to begin with an empty inventory (disks and images stay where they are)"
)


def corrupt(path: Path, why: str) -> DataCorruptError:
    """The error for a file that is not what it should be."""
    return DataCorruptError(
        f"{path} is damaged: {why}", object=str(path), action=RESTORE.format(name=path.name)
    )


def from_sqlite(error: sqlite3.Error, path: Path) -> UndercroftError:
    """The error to raise for one that SQLite reported."""
    code = getattr(error, "sqlite_errorcode", None) or 0
    primary = code & _PRIMARY
    if primary == sqlite3.SQLITE_FULL or (primary == sqlite3.SQLITE_IOERR and _full(path)):
        return no_space(path)
    if primary in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return corrupt(path, str(error))
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return DataError(
            f"{path} cannot be opened for writing: {error}",
            object=str(path),
            action=NOT_WRITABLE,
        )
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return UnavailableError(
            f"{path} is locked by another program",
            object=str(path),
            action="close whatever else has it open for writing",
        )
    if primary == sqlite3.SQLITE_IOERR:
        return UnavailableError(
            f"{path}: {error} ({getattr(error, 'sqlite_errorname', '')})",
            object=str(path),
            action="check the disk; the kernel's log says more",
        )
    return UndercroftError(f"{path}: {error}", object=str(path))


def unsure_on_disk(error: sqlite3.Error) -> bool:
    """Whether an fsync failed.

    The kernel then drops the pages it could not write and the next fsync succeeds without them
    (https://www.sqlite.org/rescode.html#ioerr_fsync; Rebello et al., "Can Applications Recover from
    fsync Failures?", USENIX ATC 2020), so nothing more can be promised until the file is reopened.
    """
    return getattr(error, "sqlite_errorcode", None) in (
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_DIR_FSYNC,
    )


def _full(path: Path) -> bool:
    try:
        stat = os.statvfs(path.parent)
    except OSError:
        return False
    return stat.f_bavail * stat.f_frsize < FULL or (stat.f_files > 0 and stat.f_favail == 0)
