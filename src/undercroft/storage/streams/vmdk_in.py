"""Reading a streamOptimized VMDK of a stranger, straight into a qcow2 of our own.

Everything that the file says is checked against its size and the size of its disk before it is
used; grains are taken apart into buffers of a fixed size.
"""

from __future__ import annotations

import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from undercroft.storage.files import require_space
from undercroft.storage.formats.common import Image, refuse
from undercroft.storage.streams.pool import in_order
from undercroft.storage.streams.qcow2_out import CLUSTER, Qcow2Writer
from undercroft.storage.streams.vmdk_out import AT_END, GRAIN, MAGIC, SECTOR, TABLE
from undercroft.storage.threads import Stop

__all__ = ["StreamHeader", "read_header", "unpack_stream"]

_COMPRESSED, _MARKERS = 1 << 16, 1 << 17
_BATCH = 16  # grains
_CHECK_EVERY = 64 << 20  # bytes written between two looks at the room left
_MOST = GRAIN + GRAIN // 2  # bytes that a compressed grain can have at most, with margin
_TOGETHER = 4 << 20  # bytes of the file that are read at once for grains
_ZERO = bytes(GRAIN)


@dataclass(frozen=True)
class StreamHeader:
    """What matters of a header that was found fit: ``capacity`` and ``directory`` in sectors."""

    capacity: int
    directory: int


def read_header(image: Image) -> StreamHeader | None:
    """The header (or footer) of a stream, if it is one that `unpack_stream` takes: with grains of
    64 KiB. The image must have been inspected (`undercroft.storage.formats`).

    Raises:
        HostileImageError: it is truncated.
    """
    found = _header(image, 0)
    if found is not None and found.directory == AT_END:
        found = _header(image, image.size - 2 * SECTOR)
    if found is None or found.directory == AT_END:
        return None
    return found


def _header(image: Image, offset: int) -> StreamHeader | None:
    magic, _, flags, capacity, grain, _, _, entries, _, directory = image.unpack(
        "<4sIIQQQQIQQ", offset, "header"
    )
    (algorithm,) = image.unpack("<H", offset + 77, "header")
    fit = magic == MAGIC and flags & _COMPRESSED and flags & _MARKERS and algorithm == 1
    if not fit or grain * SECTOR != GRAIN or entries != TABLE or capacity <= 0:
        return None
    return StreamHeader(capacity, directory)


def unpack_stream(
    image: Image,
    header: StreamHeader,
    target: int,
    directory: Path,
    stop: Stop,
    report: Callable[[float], None],
) -> None:
    """Writes the disk as a qcow2 to the descriptor ``target``, a new file in ``directory``.

    Raises:
        HostileImageError: it is malformed or truncated.
        NoSpaceError: there is no room. OSError: it cannot be written.
    """
    size = header.capacity * SECTOR
    writer = Qcow2Writer(target, size)
    checked = 0
    grains = _batches(_grains(image, header))
    results = in_order(lambda batch: _inflated(image, batch), grains)
    try:
        for done in results:
            stop.check()
            clusters = [(number, data) for number, data in done if data != _ZERO]
            if clusters:
                writer.write(clusters)
            report(done[-1][0] * GRAIN / size)
            if writer.length - checked >= _CHECK_EVERY:
                require_space("importing the disk", directory, 0)
                checked = writer.length
    finally:
        results.close()  # type: ignore[attr-defined]
    writer.finish()


def _grains(image: Image, header: StreamHeader) -> Iterator[tuple[int, int]]:
    """Number and sector of each grain that there is, ascending."""
    grains = -(-header.capacity * SECTOR // GRAIN)
    tables = -(-grains // TABLE)
    directory = _table(image, header.directory, tables, "grain directory")
    for number, sector in enumerate(directory):
        if sector == 0:
            continue
        first = number * TABLE
        table = _table(image, sector, min(TABLE, grains - first), "grain table")
        for index, place in enumerate(table):
            if place > 1:  # 1 stands for zeros
                yield first + index, place


def _table(image: Image, sector: int, entries: int, what: str) -> array[int]:
    table = array("I")
    table.frombytes(image.read(sector * SECTOR, entries * 4, what))
    if sys.byteorder == "big":
        table.byteswap()
    return table


def _batches(grains: Iterator[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for grain in grains:
        batch.append(grain)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _inflated(image: Image, batch: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """The content of grains, which mostly lie one after the other and are read at once."""
    first = min(sector for _, sector in batch) * SECTOR
    last = max(sector for _, sector in batch) * SECTOR
    if last - first > _TOGETHER:
        return [_grain(image, *grain, image.peek(grain[1] * SECTOR, _MOST)) for grain in batch]
    whole = memoryview(image.peek(first, last - first + _MOST))
    return [
        _grain(image, number, sector, whole[sector * SECTOR - first :][:_MOST])
        for number, sector in batch
    ]


def _grain(image: Image, number: int, sector: int, head: bytes | memoryview) -> tuple[int, bytes]:
    """A grain's content; the part beyond the end of the disk, and of one that is short, is zero."""
    place = sector * SECTOR
    if len(head) < 12:
        raise refuse("a grain lies outside of the file (is it truncated?)")
    lba, length = struct.unpack_from("<QI", head)
    if lba != number * (GRAIN // SECTOR):
        raise refuse("its tables and its grains contradict one another")
    if length > _MOST - 12 or place + 12 + length > image.size:
        raise refuse("a grain lies outside of the file (is it truncated?)")
    inflater = zlib.decompressobj()
    try:
        data = inflater.decompress(head[12 : 12 + length], GRAIN + 1)
    except zlib.error as error:
        raise refuse(f"a grain cannot be decompressed ({error})") from None
    if len(data) > GRAIN or not inflater.eof:
        raise refuse("a grain is damaged")
    return number, data if len(data) == CLUSTER else data.ljust(CLUSTER, b"\0")
