"""Just enough ELF to see what a program or kernel module needs (System V gABI, ch. 4, 5)."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["ElfError", "module_depends", "needed"]

_DT_NEEDED, _DT_STRTAB = 1, 5
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3


class ElfError(ValueError):
    """Not a 64-bit little-endian ELF file, or a broken one."""


@dataclass(frozen=True)
class _Segment:
    kind: int
    offset: int
    address: int
    size: int


def _segments(data: bytes) -> Iterator[_Segment]:
    if data[:6] != b"\x7fELF\x02\x01":
        raise ElfError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _flags, offset, address, _physical, length = struct.unpack_from(
            "<IIQQQQ", data, table + index * size
        )
        yield _Segment(kind, offset, address, length)


def _string(data: bytes, start: int) -> str:
    return data[start : data.index(b"\0", start)].decode()


def needed(data: bytes) -> list[str]:
    """The libraries that an ELF program or library is linked with, and its interpreter's path.

    A statically linked program needs nothing.

    Raises:
        ElfError: not such a file.
    """
    try:
        segments = list(_segments(data))
        found = [_string(data, s.offset) for s in segments if s.kind == _PT_INTERP]
        for dynamic in (s for s in segments if s.kind == _PT_DYNAMIC):
            entries = list(
                struct.iter_unpack("<qQ", data[dynamic.offset : dynamic.offset + dynamic.size])
            )
            tables = [value for tag, value in entries if tag == _DT_STRTAB]
            if not tables:
                continue
            strings = _file_offset(segments, tables[0])
            found += [_string(data, strings + value) for tag, value in entries if tag == _DT_NEEDED]
    except (struct.error, ValueError, IndexError, OverflowError) as error:
        raise ElfError(f"broken ELF file: {error}") from error
    return found


def _file_offset(segments: list[_Segment], address: int) -> int:
    for segment in segments:
        if segment.kind == _PT_LOAD and segment.address <= address < segment.address + segment.size:
            return segment.offset + address - segment.address
    raise ElfError("an address outside of the file")


def module_depends(data: bytes) -> list[str]:
    """The modules that a kernel module names in its ``depends`` (with underscores)."""
    start = data.find(b"\0depends=")
    if start < 0:
        return []
    text = _string(data, start + len(b"\0depends="))
    return [name.replace("-", "_") for name in text.split(",") if name]
