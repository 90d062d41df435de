"""Where in a stranger's file each piece of its disk is, for formats that only map places.

The file must have been inspected (`undercroft.storage.formats`). Every place is checked to lie in
the file, which qemu-img does not do: it takes what lies behind the end of a truncated file for
zeros. What these formats have besides (compression, subclusters, a log) is left to qemu-img.
"""

from __future__ import annotations

import errno
import os
import sys
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
