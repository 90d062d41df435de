"""Files that must survive a crash, and disks that fill up. All functions here block."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from undercroft.model.errors import NoSpaceError
from undercroft.model.units import MiB, format_size
from undercroft.storage.threads import Stop

__all__ = [
    "RESERVE",
    "allocated",
    "copy_sparse",
    "disk_full_is_clear",
    "free_space",
    "hash_file",
    "require_space",
    "sync_directory",
    "sync_tree",
    "write_durably",
]

RESERVE = 64 * MiB
"""Bytes that an import leaves free, so that the store can always still write."""
_CHUNK = 1 * MiB
_ZEROS = bytes(_CHUNK)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def disk_full_is_clear(what: str, directory: Path) -> Iterator[None]:
    """Turns a full disk (or quota) into an error that says so.

    Raises:
        NoSpaceError: the disk filled up inside the ``with`` block.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise no_space(what, directory) from error


def no_space(what: str, directory: Path, needed: int | None = None) -> NoSpaceError:
    """The error for a disk that is full, or too full for ``needed`` bytes."""
    free = free_space(directory)
    wanted = f" needs {format_size(needed)}, and" if needed else " finds the disk full:"
    return NoSpaceError(
        f"{what}{wanted} only {format_size(free)} are free in {directory}",
        object=str(directory),
        action="free some space (croft image rm, croft rm) or use a larger disk",
        free=free,
        needed=needed,
    )


def whole_space(directory: Path) -> tuple[int, int]:
    """Bytes that can be used in the file system of a directory, as ``df`` counts them, and those of
    them that are free. What only root may write is in neither: guests' disks are not to fill it."""
    status = os.statvfs(directory)
    used = (status.f_blocks - status.f_bfree) * status.f_frsize
    free = status.f_bavail * status.f_frsize
    return used + free, free


def free_space(directory: Path) -> int:
    """Bytes that this user can still write in the file system of a directory."""
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def require_space(what: str, directory: Path, needed: int) -> None:
    """Checks that ``needed`` bytes fit, with the reserve left over.

    Raises:
        NoSpaceError: they do not.
    """
    if free_space(directory) < needed + RESERVE:
        raise no_space(what, directory, needed)


def allocated(path: Path) -> int:
    """Bytes that a file, or all files below a directory, take on the disk."""
    status = path.lstat()
    total = status.st_blocks * 512
    if path.is_dir() and not path.is_symlink():
        total += sum(allocated(child) for child in path.iterdir())
    return total


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(path: Path) -> None:
    """Makes the files of a flat directory, and their names, durable."""
    for child in path.iterdir():
        fd = os.open(child, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    sync_directory(path)


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Writes a new file and makes its content durable (its name is, after `sync_directory`)."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def hash_file(
    path: Path,
    stop: Stop,
    report: Callable[[int], None] = lambda done: None,
    algorithm: str = "sha256",
) -> str:
    """A file's checksum in hex; ``report`` is called with the bytes read so far."""
    digest = hashlib.new(algorithm)
    done = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK):
            stop.check()
            digest.update(chunk)
            done += len(chunk)
            report(done)
    return digest.hexdigest()


def copy_sparse(
    source: int,
    target: Path,
    stop: Stop,
    report: Callable[[int], None] = lambda done: None,
    *,
    limit: int | None = None,
    start: int = 0,
) -> str:
    """Copies from a descriptor, from byte ``start`` on, into a new file, with holes for zeros;
    returns the SHA-256 of what was copied in hex.

    At most ``limit`` bytes are read: a file that grows under our hands cannot grow for ever.
    """
    digest = hashlib.sha256()
    done = 0
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(fd, "wb", buffering=0):
        while limit is None or done < limit:
            most = _CHUNK if limit is None else min(_CHUNK, limit - done)
            chunk = os.pread(source, most, start + done)
            if not chunk:
                break
            stop.check()
            digest.update(chunk)
            if chunk != _ZEROS:
                view = memoryview(chunk)
                at = done
                while view:
                    written = os.pwrite(fd, view, at)
                    view = view[written:]
                    at += written
            done += len(chunk)
            report(done)
        os.ftruncate(fd, done)
    return digest.hexdigest()


def remove_tree(path: Path) -> None:
    """Removes a directory of ours with everything in it; nothing happens if it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)
