"""Writing a streamOptimized VMDK (VMware, "Virtual Disk Format 5.0", "Stream-Optimized
Compressed Sparse Extents"): what OVF packages have.

    header  descriptor  {grain …}  {grain table} …  grain directory  footer  end

Each grain is 64 KiB of the disk, deflated, behind its sector and length. Those that are zero are
left out. Tables follow the grains that they list, so nothing is written twice.
"""

from __future__ import annotations

import os
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from undercroft.model.errors import TooLargeError
from undercroft.storage.streams.extents import Piece
from undercroft.storage.streams.pool import in_order
from undercroft.storage.threads import Stop

__all__ = ["GRAIN", "Digest", "write_stream"]

GRAIN = 65536
SECTOR = 512
MAGIC = b"KDMV"
AT_END = 0xFFFFFFFFFFFFFFFF
OVERHEAD = 128  # sectors before the first grain
DESCRIPTOR = 20  # sectors
TABLE = 512  # grains of a table
GRAIN_TABLE, GRAIN_DIRECTORY, FOOTER = 1, 2, 3  # types of markers
_FLAGS = 0x30001  # line ends can be checked; compressed; with markers
_BATCH = 16 * GRAIN
# Level 3 is twice as fast as zlib's default and gives 5 % more (measured on a disk of Debian's).
_LEVEL = 3
_ZERO = bytes(GRAIN)
_MAX_SECTORS = 1 << 32

Batch = list[Piece]


class Digest(Protocol):
    """What is told of all that is written; as of hashlib."""

    def update(self, data: bytes, /) -> None:
        """More bytes."""


class _Out:
    """A place in a file where bytes are appended and digested."""

    def __init__(self, fd: int, at: int, digest: Digest) -> None:
        self.fd = fd
        self.start = self.at = at
        self.digest = digest

    @property
    def sector(self) -> int:
        return (self.at - self.start) // SECTOR

    def write(self, data: bytes) -> None:
        self.digest.update(data)
        view = memoryview(data)
        while view:
            written = os.pwrite(self.fd, view, self.at)
            view = view[written:]
            self.at += written


def write_stream(
    fd: int,
    at: int,
    size: int,
    pieces: Iterable[Piece],
    sources: Sequence[int],
    digest: Digest,
    stop: Stop,
    report: Callable[[int], None],
    *,
    cid: int,
    adapter: str = "lsilogic",
) -> int:
    """Writes a disk of ``size`` bytes to ``fd`` from offset ``at`` on; the length of the VMDK.

    ``pieces``: where in the ``sources`` (descriptors) its data is, ascending; ``report`` gets how
    far on the disk it is; ``cid`` is the content's id (any number).

    Raises:
        OSError: the target is full, or a source cannot be read.
        TooLargeError: there is more data than the format can hold.
    """
    capacity = -(-size // SECTOR)
    out = _Out(fd, at, digest)
    out.write(_header(capacity, AT_END))
    out.write(_descriptor(size, cid, adapter).ljust((OVERHEAD - 1) * SECTOR, b"\0"))
    directory = array("I", bytes(4 * -(-capacity * SECTOR // (TABLE * GRAIN))))
    table, number = array("I", bytes(4 * TABLE)), -1

    def flush() -> None:
        if number >= 0 and any(table):
            out.write(_marker(4, GRAIN_TABLE))
            directory[number] = out.sector
            out.write(_little(table))

    def work(batch: Batch) -> list[tuple[int, bytes]]:
        return list(_deflated(batch, sources))

    batches = _batches(pieces)
    results = in_order(work, batches)
    try:
        for grains in results:
            stop.check()
            joined = bytearray()
            base = out.sector
            for index, data in grains:
                if index // TABLE != number:
                    out.write(bytes(joined))
                    joined.clear()
                    flush()
                    table, number = array("I", bytes(4 * TABLE)), index // TABLE
                    base = out.sector
                sector = base + len(joined) // SECTOR
                if sector >= _MAX_SECTORS:
                    raise TooLargeError("a VMDK of this kind has at most 2 TiB of data")
                table[index % TABLE] = sector
                joined += struct.pack("<QI", index * GRAIN // SECTOR, len(data))
                joined += data
                joined += bytes(-len(joined) % SECTOR)
            out.write(bytes(joined))
            if grains:
                report(grains[-1][0] * GRAIN)
    finally:
        results.close()  # type: ignore[attr-defined]
    flush()
    listed = _little(directory)
    listed += bytes(-len(listed) % SECTOR)
    out.write(_marker(len(listed) // SECTOR, GRAIN_DIRECTORY))
    place = out.sector
    out.write(listed)
    out.write(_marker(1, FOOTER))
    out.write(_header(capacity, place))
    out.write(bytes(SECTOR))
    return out.at - at


def _batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """The pieces of each stretch of `_BATCH` bytes that has any."""
    batch: Batch = []
    current = -1
    for piece in pieces:
        start, end = piece.start, piece.start + piece.length
        while start < end:
            stretch = start // _BATCH
            if stretch != current and batch:
                yield batch
                batch = []
            current = stretch
            stop = min(end, (stretch + 1) * _BATCH)
            batch.append(
                Piece(start, stop - start, piece.depth, piece.offset + start - piece.start)
            )
            start = stop
    if batch:
        yield batch


def _deflated(batch: Batch, sources: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Numbers and compressed content of the grains of a batch that are not zero."""
    base = batch[0].start // _BATCH * _BATCH
    buffer = bytearray(_BATCH)
    view = memoryview(buffer)
    used: set[int] = set()
    for piece in batch:
        at, end = piece.start - base, piece.start - base + piece.length
        used.update(range(at // GRAIN, (end - 1) // GRAIN + 1))
        offset = piece.offset
        while at < end:
            read = os.preadv(sources[piece.depth], [view[at:end]], offset)
            if read == 0:  # the end of a raw image that is no whole number of clusters
                break
            at, offset = at + read, offset + read
    for grain in sorted(used):
        data = bytes(view[grain * GRAIN : (grain + 1) * GRAIN])
        if data != _ZERO:
            yield base // GRAIN + grain, zlib.compress(data, _LEVEL)


def _little(table: array[int]) -> bytes:
    if struct.pack("=I", 1) != struct.pack("<I", 1):
        table = table[:]
        table.byteswap()
    return table.tobytes()


def _header(capacity: int, directory: int) -> bytes:
    return struct.pack(
        "<4sIIQQQQIQQQB4sH", MAGIC, 3, _FLAGS, capacity, GRAIN // SECTOR, 1, DESCRIPTOR, TABLE,
        0, directory, OVERHEAD, 0, b"\n \r\n", 1,
    ).ljust(SECTOR, b"\0")  # fmt: skip


def _marker(sectors: int, kind: int) -> bytes:
    return struct.pack("<QII", sectors, 0, kind).ljust(SECTOR, b"\0")


def _descriptor(size: int, cid: int, adapter: str) -> bytes:
    sectors = -(-size // SECTOR)
    heads, per_track = (255, 63) if adapter != "ide" else (16, 63)
    cylinders = max(1, min(sectors // (heads * per_track), 16383 if adapter == "ide" else 1 << 30))
    return f"""# Disk DescriptorFile
version=1
CID={cid & 0xFFFFFFFF:08x}
parentCID=ffffffff
createType="streamOptimized"

# Extent description
RW {sectors} SPARSE "disk.vmdk"

# The Disk Data Base
#DDB

ddb.adapterType = "{adapter}"
ddb.geometry.cylinders = "{cylinders}"
ddb.geometry.heads = "{heads}"
ddb.geometry.sectors = "{per_track}"
ddb.virtualHWVersion = "13"
""".encode()
