"""Writing a fresh qcow2 (docs/interop/qcow2.rst) from front to back, in the order of the disk."""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Sequence

from undercroft.model.errors import UndercroftError

__all__ = ["CLUSTER", "Qcow2Writer"]

CLUSTER = 65536
_ENTRIES = CLUSTER // 8  # of a table
_COUNTS = CLUSTER // 2  # reference counts of a block
_COPIED = 1 << 63
_HEADER = 104
_VECTOR = 1024  # pieces that the system takes at once (IOV_MAX)


class Qcow2Writer:
    """Takes the clusters of a disk of ``size`` bytes in ascending order; what is left out is zero.

    The file is no qcow2 before `finish`. Raises OSError where it cannot be written.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._entries = max(1, -(-size // (CLUSTER * _ENTRIES)))
        self._l1 = array("Q", bytes(8 * self._entries))
        self._next = 1 + -(-self._entries * 8 // CLUSTER)  # clusters of the file in use
        self._l2 = array("Q")
        self._number = -1  # which table that is
        self._last = -1

    @property
    def length(self) -> int:
        """Bytes of the file so far."""
        return self._next * CLUSTER

    def write(self, clusters: Sequence[tuple[int, bytes | memoryview]]) -> None:
        """Numbers and content of clusters of the disk, each of `CLUSTER` bytes."""
        pending: list[bytes | memoryview] = []
        first = self._next
        for index, data in clusters:
            if index <= self._last or index * CLUSTER >= self._size or len(data) != CLUSTER:
                raise UndercroftError(f"cluster {index} is out of order")
            self._last = index
            number, entry = divmod(index, _ENTRIES)
            if number != self._number:
                self._put_all(pending, first)
                pending = []
                self._flush()
                self._number, self._l2 = number, array("Q", bytes(CLUSTER))
                self._l1[number] = self._next * CLUSTER | _COPIED
                self._next += 1
                first = self._next
            self._l2[entry] = self._next * CLUSTER | _COPIED
            self._next += 1
            pending.append(data)
        self._put_all(pending, first)

    def finish(self) -> None:
        """Writes the tables; the file is whole then (but not yet synchronised)."""
        self._flush()
        blocks = tables = 0
        while True:
            total = self._next + blocks + tables
            wanted = -(-total // _COUNTS)
            if wanted == blocks and tables == -(-blocks // _ENTRIES):
                break
            blocks, tables = wanted, -(-wanted // _ENTRIES)
        table = self._next
        references = array("Q", ((table + tables + n) * CLUSTER for n in range(blocks)))
        self._put(_big(references).ljust(tables * CLUSTER, b"\0"), table)
        for block in range(blocks):
            used = min(total - block * _COUNTS, _COUNTS)
            self._put((b"\0\1" * used).ljust(CLUSTER, b"\0"), table + tables + block)
        self._put(_big(self._l1), 1)
        header = struct.pack(
            ">4sIQIIQIIQQIIQQQQII", b"QFI\xfb", 3, 0, 0, 16, self._size, 0, self._entries,
            CLUSTER, table * CLUSTER, tables, 0, 0, 0, 0, 0, 4, _HEADER,
        )  # fmt: skip
        self._put(header.ljust(CLUSTER, b"\0"), 0)
        os.ftruncate(self._fd, total * CLUSTER)

    def _flush(self) -> None:
        if self._number >= 0:
            place = (self._l1[self._number] & ~_COPIED) // CLUSTER
            self._put(_big(self._l2), place)

    def _put_all(self, clusters: list[bytes | memoryview], first: int) -> None:
        at, end = first * CLUSTER, (first + len(clusters)) * CLUSTER
        while at < end:
            done, inside = divmod(at - first * CLUSTER, CLUSTER)
            vector = clusters[done : done + _VECTOR]
            vector[0] = memoryview(vector[0])[inside:]
            at += os.pwritev(self._fd, vector, at)

    def _put(self, data: bytes, cluster: int) -> None:
        view, at = memoryview(data), cluster * CLUSTER
        while view:
            written = os.pwrite(self._fd, view, at)
            view, at = view[written:], at + written


def _big(table: array[int]) -> bytes:
    if struct.pack("=I", 1) == struct.pack("<I", 1):
        table = table[:]
        table.byteswap()
    return table.tobytes()
