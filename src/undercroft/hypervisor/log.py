"""Logs that others fill and that therefore must not grow: two segments, the older one dropped."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

__all__ = ["BoundedLog", "read_tail"]

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BoundedLog:
    """Appends to ``path``, moving it to ``path.1`` when it has half of ``limit`` bytes.

    Output that finds no space on the disk is dropped, and a line says how much once there is
    room again. `write` blocks for as long as the disk takes: call it from a thread.
    """

    def __init__(self, path: Path, limit: int, *, mode: int = 0o600) -> None:
        self.path = path
        self._segment = max(limit // 2, 4096)
        self._mode = mode
        self._descriptor = -1
        self._size = 0
        self.lost = 0

    def write(self, data: bytes) -> bool:
        """Appends; False if (some of) it was lost."""
        if len(data) > self._segment:
            data = data[-self._segment :]
        try:
            if self.lost:
                note = f"\n[{self.lost} bytes of output lost: no space on the host]\n".encode()
                self._append(note)
                self.lost = 0
            self._append(data)
        except OSError as error:
            self.lost += len(data)
            if error.errno not in _NO_SPACE:
                self.close()  # the directory is gone, or worse; try anew next time
            return False
        return True

    def _append(self, data: bytes) -> None:
        if self._descriptor < 0:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self.path, flags, self._mode)
            self._size = os.fstat(self._descriptor).st_size
        if self._size + len(data) > self._segment:
            self.close()
            os.replace(self.path, _older(self.path))
            self._append(data)
            return
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            self._size += written
            view = view[written:]

    def close(self) -> None:
        """Closes the file; the next write opens it again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._size = 0


def _older(path: Path) -> Path:
    return path.with_name(path.name + ".1")


def read_tail(path: Path, limit: int) -> bytes:
    """The last ``limit`` bytes written to a `BoundedLog`; empty if there never was one."""
    kept: list[bytes] = []
    for segment in (path, _older(path)):
        if limit <= 0:
            break
        with contextlib.suppress(FileNotFoundError), segment.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - limit))
            data = file.read(limit)
            kept.append(data)
            limit -= len(data)
    return b"".join(reversed(kept))
