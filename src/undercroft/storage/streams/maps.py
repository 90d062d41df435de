"""Where in a stranger's file each piece of its disk is, for formats that only map places.

The file must have been inspected (`undercroft.storage.formats`). Every place is checked to lie in
the file, which qemu-img does not do: it takes what lies behind the end of a truncated file for
zeros. What these formats have besides (compression, subclusters, a log) is left to qemu-img.
"""

from __future__ import annotations

import errno
import os
import sys
import uuid
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from undercroft.model.image import DiskFormat
from undercroft.storage.formats.common import Image, refuse
from undercroft.storage.formats.vmdk_extents import SECTOR, Extent

__all__ = ["Span", "extents_map", "map_of"]

_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED, _ZERO = 1 << 62, 1
_EXTENDED_L2 = 1 << 4
_TABLE = 8192  # entries read at once
_SLACK = 2 << 20  # the largest cluster, for the last that ends early
_VHDX_HEADERS = (64 << 10, 128 << 10)
_VHDX_REGIONS = 192 << 10
_VHDX_BAT, _VHDX_METADATA, _VHDX_BLOCK, _VHDX_SIZE, _VHDX_SECTOR = (
    uuid.UUID(text).bytes_le
    for text in (
        "2DC27766-F623-4200-9D64-115E9BFD4A08",
        "8B7CA206-4790-4B9A-B8FE-575F050F886E",
        "CAA16737-FA36-4D43-B3B6-33F0AA44E76B",
        "2FA54224-CD1B-4876-B211-5DBED83BF4B8",
        "8141BF1D-A96F-4709-BA47-F233A8FAAB5F",
    )
)
_AT_END = 0xFFFFFFFFFFFFFFFF


@dataclass(frozen=True)
class Span:
    """``length`` bytes of the disk from ``start`` on are in the file from ``offset`` on (counted
    from the file's own beginning)."""

    start: int
    length: int
    offset: int


def map_of(image: Image, format: DiskFormat) -> Iterator[Span] | None:
    """The pieces that hold data, ascending; what is left out is zero. None: there is something in
    it that only qemu-img can read.

    Raises (also while it is gone through):
        HostileImageError: data lies outside of the file, or there is more of it than the file has.
    """
    spans: Iterator[Span] | None = None
    if format is DiskFormat.RAW:
        return _raw(image)
    if format is DiskFormat.QCOW2:
        spans = _qcow2(image)
    elif format is DiskFormat.VMDK:
        spans = _vmdk(image)
    elif format is DiskFormat.VDI:
        spans = _vdi(image)
    elif format is DiskFormat.VPC:
        spans = _vhd(image)
    elif format is DiskFormat.VHDX:
        spans = _vhdx(image)
    return _checked(image, spans, format is DiskFormat.QCOW2) if spans is not None else None


def extents_map(
    extents: Sequence[Extent], image_of: Callable[[str], Image]
) -> Iterator[Span] | None:
    """The same for a VMDK in several files, all of them inside one (`Span.offset` counts there)."""
    sparse = [extent for extent in extents if extent.kind == "SPARSE"]
    if any(_vmdk(image_of(extent.file)) is None for extent in sparse):
        return None
    return _extents(extents, image_of)


def _extents(extents: Sequence[Extent], image_of: Callable[[str], Image]) -> Iterator[Span]:
    start = 0
    for extent in extents:
        length = extent.sectors * SECTOR
        if extent.kind != "ZERO":
            image = image_of(extent.file)
            begin = extent.offset * SECTOR
            if extent.kind == "SPARSE":
                found = map_of(image, DiskFormat.VMDK)
            else:
                found = _raw(Image(image.fd, length, image.start + begin))
            for span in found or ():
                if span.start < length:
                    size = min(span.length, length - span.start)
                    yield Span(start + span.start, size, span.offset)
        start += length


def _checked(image: Image, spans: Iterator[Span], early: bool) -> Iterator[Span]:
    """No place serves twice in these formats, so a file cannot hold more than it has: one that
    claims so is meant to fill the disk. ``early``: the last piece of such a file may end before it
    is full; what is not there is zero, and not what follows in a package."""
    total = 0
    for span in spans:
        total += span.length
        offset = span.offset - image.start
        length = min(span.length, image.size - offset)
        if offset < 0 or length <= 0 or (length < span.length and not early):
            raise refuse("some of its data lies outside of the file (is it truncated?)")
        if total > image.size + _SLACK:
            raise refuse("it claims to hold more data than it has")
        yield Span(span.start, length, span.offset)


def _raw(image: Image) -> Iterator[Span]:
    """The parts of a plain file that are no holes."""
    at, end = image.start, image.start + image.size
    while at < end:
        try:
            begin = os.lseek(image.fd, at, os.SEEK_DATA)
            hole = os.lseek(image.fd, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:  # a hole up to the end
                return
            begin, hole = at, end
        begin, hole = min(begin, end), min(hole, end)
        if begin < hole:
            yield Span(begin - image.start, hole - begin, begin)
        at = max(hole, at + 1)


def _table(image: Image, offset: int, count: int, code: str, big: bool) -> array[int]:
    """Entries of a table: ``code`` as of `array`."""
    table = array(code)
    table.frombytes(image.read(offset, count * table.itemsize, "table"))
    if big == (sys.byteorder == "little"):
        table.byteswap()
    return table


def _qcow2(image: Image) -> Iterator[Span] | None:
    version, bits, size, l1_size, l1_offset = image.unpack(">4xI12xIQ4xIQ", 0, "header")
    features = image.unpack(">Q", 72, "header")[0] if version == 3 else 0
    if features & _EXTENDED_L2:
        return None
    cluster = 1 << bits
    reach = cluster // 8

    def tables() -> Iterator[tuple[int, array[int]]]:
        used = min(l1_size, -(-size // (cluster * reach)))
        for first in range(0, used, _TABLE):
            count = min(_TABLE, used - first)
            for index, entry in enumerate(_table(image, l1_offset + 8 * first, count, "Q", True)):
                if entry & _OFFSET:
                    yield first + index, _table(image, entry & _OFFSET, reach, "Q", True)

    if any(entry & _COMPRESSED for _, table in tables() for entry in table if entry):
        return None

    def spans() -> Iterator[Span]:
        zero = _ZERO if version == 3 else 0
        for number, table in tables():
            start = number * reach * cluster
            for entry in table:
                if entry & _OFFSET and not entry & zero and start < size:
                    length = min(cluster, size - start)
                    yield Span(start, length, image.start + (entry & _OFFSET))
                start += cluster

    return spans()


def _vmdk(image: Image) -> Iterator[Span] | None:
    _, _, flags, capacity, grain, _, _, entries, _, directory = image.unpack(
        "<4sIIQQQQIQQ", 0, "header"
    )
    if flags & 0x30000 or directory == _AT_END:
        return None

    def spans() -> Iterator[Span]:
        size, length = capacity * SECTOR, grain * SECTOR
        grains = -(-capacity // grain)
        tables = -(-grains // entries)
        for first in range(0, tables, _TABLE):
            count = min(_TABLE, tables - first)
            places = _table(image, directory * SECTOR + 4 * first, count, "I", False)
            for index, place in enumerate(places):
                if place == 0:
                    continue
                number = (first + index) * entries
                table = _table(image, place * SECTOR, min(entries, grains - number), "I", False)
                for at, sector in enumerate(table, number):
                    if sector > 1:  # 1 stands for zeros
                        most = min(length, size - at * length)
                        yield Span(at * length, most, image.start + sector * SECTOR)

    return spans()


def _vdi(image: Image) -> Iterator[Span]:
    table_at, data_at = image.unpack("<II", 340, "header")
    size, block, _, blocks, _ = image.unpack("<QIIII", 368, "header")
    for first in range(0, blocks, _TABLE):
        count = min(_TABLE, blocks - first)
        for index, entry in enumerate(_table(image, table_at + 4 * first, count, "I", False)):
            start = (first + index) * block
            if entry < 0xFFFFFFFE and start < size:
                yield Span(start, min(block, size - start), image.start + data_at + entry * block)


def _vhd(image: Image) -> Iterator[Span]:
    at = 0 if image.peek(0, 8) == b"conectix" else image.size - 512
    (data_at,) = image.unpack(">Q", at + 16, "footer")
    size, kind = image.unpack(">Q4xI", at + 48, "footer")
    if kind == 2:  # fixed
        yield from _raw(Image(image.fd, size, image.start))
        return
    table_at, entries, block = image.unpack(">16xQ4xII", data_at, "dynamic header")
    bitmap = -(-block // SECTOR // 8 // SECTOR) * SECTOR  # which sectors were ever written
    for first in range(0, entries, _TABLE):
        count = min(_TABLE, entries - first)
        for index, entry in enumerate(_table(image, table_at + 4 * first, count, "I", True)):
            start = (first + index) * block
            if entry != 0xFFFFFFFF and start < size:
                offset = image.start + entry * SECTOR + bitmap
                yield Span(start, min(block, size - start), offset)


def _vhdx(image: Image) -> Iterator[Span] | None:
    """[MS-VHDX]; None if its log has to be replayed, or it lacks what we look for."""
    logs = [image.unpack("<4s44x16s", at, "header") for at in _VHDX_HEADERS]
    if any(magic != b"head" or log != bytes(16) for magic, log in logs):
        return None
    regions = _vhdx_table(image, _VHDX_REGIONS, "<16sQI4x")
    if _VHDX_BAT not in regions or _VHDX_METADATA not in regions:
        return None
    metadata = regions[_VHDX_METADATA][0]
    items = _vhdx_table(image, metadata, "<16sII8x")
    values = {}
    for item, layout in ((_VHDX_BLOCK, "<I"), (_VHDX_SIZE, "<Q"), (_VHDX_SECTOR, "<I")):
        if item not in items:
            return None
        (values[item],) = image.unpack(layout, metadata + items[item][0], "metadata")
    block, size, sector = values[_VHDX_BLOCK], values[_VHDX_SIZE], values[_VHDX_SECTOR]
    if block < 1 << 20 or block > 256 << 20 or block & (block - 1) or sector not in (512, 4096):
        raise refuse("its blocks are not possible")
    ratio = (sector << 23) // block  # blocks between two entries that are not for blocks
    place, length = regions[_VHDX_BAT]
    blocks = -(-size // block)
    if (blocks + (blocks - 1) // ratio) * 8 > length:
        raise refuse("its block table is too small for its disk")

    def spans() -> Iterator[Span]:
        for first in range(0, blocks, _TABLE):
            last = min(first + _TABLE, blocks) - 1
            begin = first + first // ratio
            count = last + last // ratio + 1 - begin
            table = _table(image, place + 8 * begin, count, "Q", False)
            for number in range(first, last + 1):
                entry = table[number + number // ratio - begin]
                state, offset = entry & 7, entry >> 20 << 20
                if state in (6, 7):
                    start = number * block
                    yield Span(start, min(block, size - start), image.start + offset)

    return spans()


def _vhdx_table(image: Image, at: int, layout: str) -> dict[bytes, tuple[int, int]]:
    """The entries of the region table or the metadata table, by their ids."""
    regions = at == _VHDX_REGIONS
    (count,) = image.unpack("<I" if regions else "<H", at + (8 if regions else 10), "table")
    begin = at + (16 if regions else 32)
    found = {}
    for index in range(min(count, 2047)):
        id, offset, length = image.unpack(layout, begin + 32 * index, "table")
        found[id] = (offset, length)
    return found
