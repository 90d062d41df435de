"""Copies of files that share their blocks where the file system can (ioctl_ficlonerange(2)), and
else are made by the kernel, hole by hole. All functions here block."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from undercroft.storage.threads import Stop

__all__ = ["can_reflink", "copy_file"]

FICLONE = 0x40049409
_CHUNK = 64 << 20
_CANNOT = (
    errno.EOPNOTSUPP,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EBADF,
)


def can_reflink(directory: Path) -> bool:
    """Whether files of a directory can share blocks."""
    first, second = (directory / f"reflink-{secrets.token_hex(8)}" for _ in range(2))
    try:
        first.write_bytes(b"x" * 4096)
        with first.open("rb") as source, second.open("xb") as target:
            return _clone(source.fileno(), target.fileno())
    finally:
        first.unlink(missing_ok=True)
        second.unlink(missing_ok=True)


def copy_file(
    source: Path, target: Path, stop: Stop, progress: Callable[[float], None] | None = None
) -> bool:
    """Copies a file into a new one, durably; whether they share their blocks.

    Raises:
        OSError: it cannot be copied.
    """
    with source.open("rb") as reading:
        fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            shared = _clone(reading.fileno(), fd)
            if not shared:
                _copy(reading.fileno(), fd, stop, progress)
            os.fsync(fd)
        finally:
            os.close(fd)
    return shared


def _clone(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, FICLONE, source)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
        return False
    return True


def _copy(source: int, target: int, stop: Stop, progress: Callable[[float], None] | None) -> None:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            begin = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole to the end
                return
            raise
        at = end = os.lseek(source, begin, os.SEEK_HOLE)
        while begin < end:
            stop.check()
            begin += _piece(source, target, begin, min(_CHUNK, end - begin))
            if progress is not None:
                progress(begin / size)


def _piece(source: int, target: int, at: int, length: int) -> int:
    try:
        done = os.copy_file_range(source, target, length, at, at)
        if done:
            return done
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    return os.pwrite(target, os.pread(source, min(length, 1 << 20), at), at)
