"""Writes initramfs archives ("newc" cpio), with owners and device nodes, as any user.

Format: Linux, Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from typing import BinaryIO

__all__ = ["CpioWriter"]


class CpioWriter:
    """Appends entries to an archive; everything belongs to root and is dated 0 (repeatable).

    Paths are relative, without a leading slash; missing parent directories are added.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._inode = 0
        self._seen: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """A directory, unless it is there already."""
        if path in self._seen:
            return
        self._parents(path)
        self._entry(path, stat.S_IFDIR | mode, b"", links=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """A character device node."""
        self._parents(path)
        self._entry(path, stat.S_IFCHR | mode, b"", device=(major, minor))

    def close(self) -> None:
        """Writes the end mark; the stream itself stays open."""
        self._entry("TRAILER!!!", 0, b"")
        self._out.write(b"\0" * (-self._out.tell() % 512))

    def _parents(self, path: str) -> None:
        if "/" in path:
            self.directory(path.rpartition("/")[0])

    def _entry(
        self,
        path: str,
        mode: int,
        data: bytes,
        *,
        links: int = 1,
        device: tuple[int, int] = (0, 0),
    ) -> None:
        if path in self._seen:
            raise ValueError(f"{path} is in the archive already")
        self._seen.add(path)
        self._inode += 1
        name = path.encode() + b"\0"
        fields = (
            self._inode, mode, 0, 0, links, 0, len(data), 0, 0, *device, len(name), 0,
        )  # fmt: skip
        self._out.write(b"070701" + b"".join(b"%08x" % field for field in fields))
        self._out.write(name + b"\0" * (-(110 + len(name)) % 4))
        self._out.write(data + b"\0" * (-len(data) % 4))
