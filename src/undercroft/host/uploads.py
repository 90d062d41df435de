"""Uploads: files in DATA/cache/uploads, which grow at their end only."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.model.errors import BusyError, NoSpaceError, WrongStateError
from undercroft.model.transfer import UploadStatus
from undercroft.storage.files import disk_full_is_clear, require_space

_BATCH = 1 << 20
_CHECK_EVERY = 64 << 20


def upload_path(environment: Environment, key: str) -> Path:
    """Where an upload is."""
    return environment.directory.uploads / key


async def status(environment: Environment, key: str) -> UploadStatus:
    """How much of it is there."""
    return await asyncio.to_thread(_status, upload_path(environment, key), key)


def _status(path: Path, key: str) -> UploadStatus:
    try:
        return UploadStatus(key=key, size=path.stat().st_size)
    except FileNotFoundError:
        return UploadStatus(key=key, size=0)


async def append(
    environment: Environment, key: str, offset: int, content: AsyncIterator[bytes]
) -> UploadStatus:
    """Adds to an upload; see `undercroft.operations.uploads`."""
    path = upload_path(environment, key)
    try:
        with disk_full_is_clear("what is being sent", path.parent):
            fd = await asyncio.to_thread(_open, path, key, offset)
            try:
                return UploadStatus(key=key, size=await _write_all(fd, path, offset, content))
            finally:
                os.close(fd)
    except NoSpaceError:
        with contextlib.suppress(OSError):  # it would only be in the way of what else there is
            path.unlink()
        raise


def _open(path: Path, key: str, offset: int) -> int:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    require_space("what is being sent", path.parent, 0)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"upload {key[:12]} is being sent by somebody else",
                action="wait until that ends",
            ) from None
        size = os.fstat(fd).st_size
        if size != offset:
            raise WrongStateError(
                f"upload {key[:12]} has {size} bytes, so it cannot go on from {offset}",
                action=f"go on from {size}",
                size=size,
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


async def _write_all(fd: int, path: Path, at: int, content: AsyncIterator[bytes]) -> int:
    batch = bytearray()
    checked = at
    try:
        async for piece in content:
            batch += piece
            if len(batch) >= _BATCH:
                at += await asyncio.to_thread(_write, fd, bytes(batch), at)
                batch.clear()
                if at - checked >= _CHECK_EVERY:
                    await asyncio.to_thread(require_space, "what is being sent", path.parent, 0)
                    checked = at
    finally:  # what came before a connection broke counts, too
        at += _write(fd, bytes(batch), at)
        os.ftruncate(fd, at)
    return at


def _write(fd: int, data: bytes, at: int) -> int:
    view = memoryview(data)
    if data == bytes(len(data)):  # a hole, which the end of the file will enclose
        return len(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written
    return len(data)


async def remove(environment: Environment, key: str) -> UploadStatus:
    """Forgets an upload."""
    path = upload_path(environment, key)
    before = await asyncio.to_thread(_status, path, key)
    await asyncio.to_thread(path.unlink, True)
    return before
