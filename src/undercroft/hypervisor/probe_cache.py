"""Answers that cost a process to get, kept in small JSON files. Losing them costs only time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any, TypeVar

import msgspec

__all__ = ["file_identity", "load", "save"]

_T = TypeVar("_T")
_LARGEST = 1 << 20


def file_identity(path: str | Path) -> str:
    """Changes whenever another file stands at ``path``; empty if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return ""
    real = os.path.realpath(path)
    return f"{real} {found.st_dev}:{found.st_ino} {found.st_size} {found.st_mtime_ns}"


async def load(path: Path, type: type[_T]) -> _T | None:
    """What `save` wrote; None if there is nothing, or something else."""

    def read() -> bytes:
        with path.open("rb") as file:
            return file.read(_LARGEST)

    try:
        return msgspec.json.decode(await asyncio.to_thread(read), type=type)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


async def save(path: Path, value: Any) -> None:
    """Replaces the file at once and as a whole. A disk that is full or read-only is no failure."""
    with contextlib.suppress(OSError):
        await asyncio.to_thread(_replace, path, msgspec.json.encode(value))


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
