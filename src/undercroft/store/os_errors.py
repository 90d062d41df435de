"""What the operating system's errors mean to a user, where it refuses a file of ours."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from undercroft.model.errors import DataError, NoSpaceError, UndercroftError

NOT_WRITABLE = (
    "check the owner and mode of the directory, and that the file system is not mounted read-only"
)


def no_space(path: Path) -> NoSpaceError:
    """The error for a full disk."""
    return NoSpaceError(
        f"the disk is full: nothing can be written to {path}",
        object=str(path),
        action=f"make room on the file system of {path.parent}; nothing was lost",
    )


def from_os(error: OSError, path: Path) -> UndercroftError:
    """The error to raise for one that the operating system reported about this path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_space(path)
    if error.errno == errno.ENOENT:
        return DataError(
            f"{path.parent} does not exist",
            object=str(path),
            action="create it, or name another data directory with --data or CROFT_DATA",
        )
    return DataError(
        f"{path} cannot be used: {os.strerror(error.errno or 0)}",
        object=str(path),
        action=NOT_WRITABLE,
    )
