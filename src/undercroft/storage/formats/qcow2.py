"""qcow2, as of QEMU's docs/interop/qcow2.rst."""

from __future__ import annotations

import struct
import sys
from array import array
from collections import Counter

from undercroft.storage.formats.common import Image, Inspected, Limits, check_virtual_size, refuse

MAGIC = b"QFI\xfb"

_DIRTY, _CORRUPT, _DATA_FILE, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_BACKING_FORMAT, _DATA_FILE_NAME, _FULL_ENCRYPTION = 0xE2792ACA, 0x44415441, 0x0537BE77
_MAX_L1_BYTES = 32 << 20  # QEMU's own limit (QCOW_MAX_L1_SIZE)
_MAX_REFCOUNT_TABLE_BYTES = 8 << 20  # likewise (QCOW_MAX_REFTABLE_SIZE)
_MAX_SNAPSHOTS = 256  # QEMU allows 65536; all are dropped by an import
_OFFSET = 0x00FFFFFFFFFFFE00
_COMPRESSED = 1 << 62
_ZERO = 1


def stays_inside(header: bytes) -> bool:
    """Whether a file of ours that begins with these bytes (104 or more) is qcow2 and has its data
    in itself. What it lies on is not looked at: that is stated elsewhere."""
    if len(header) < 80 or not header.startswith(MAGIC):
        return False
    (version,) = struct.unpack_from(">I", header, 4)
    features = struct.unpack_from(">Q", header, 72)[0] if version >= 3 else 0
    return version in (2, 3) and not features & _DATA_FILE


def inspect(image: Image, limits: Limits) -> Inspected:
    """Checks the header and every table that leads to data.

    Raises:
        HostileImageError: not qcow2; or it has a backing file, an external data file or
            encryption; or it is corrupt, truncated or beyond a limit.
    """
    (
        magic, version, backing_offset, backing_size, cluster_bits, size, crypt, l1_size,
        l1_offset, refcount_offset, refcount_clusters, snapshots, _,
    ) = image.unpack(">4sIQIIQIIQQIIQ", 0, "header")  # fmt: skip
    if magic != MAGIC:
        raise refuse("it is not in qcow2 format")
    if version not in (2, 3):
        raise refuse(f"qcow2 version {version} is not known")
    if backing_offset or backing_size:
        raise refuse("it has a backing file: it would show the guest another file of this host")
    if crypt:
        raise refuse("it is encrypted")
    if not 9 <= cluster_bits <= 21:
        raise refuse(f"its clusters of 2^{cluster_bits} bytes are not possible")
    features = _features(image, version, 1 << cluster_bits)
    check_virtual_size(size, limits)
    cluster = 1 << cluster_bits
    if snapshots > _MAX_SNAPSHOTS:
        raise refuse(f"it has {snapshots} snapshots inside, more than {_MAX_SNAPSHOTS}")
    if refcount_clusters * cluster > _MAX_REFCOUNT_TABLE_BYTES or refcount_clusters == 0:
        raise refuse("the size of its refcount table is not possible")
    if refcount_offset % cluster or refcount_offset + refcount_clusters * cluster > image.size:
        raise refuse("its refcount table lies outside of the file (is it truncated?)")
    entry_size = 16 if features & _EXTENDED_L2 else 8
    reach = cluster * (cluster // entry_size)  # bytes of disk per L2 table
    if l1_size * 8 > _MAX_L1_BYTES:
        raise refuse(f"its L1 table with {l1_size} entries is too large")
    if l1_size < -(-size // reach):
        raise refuse("its L1 table is too small for its disk")
    if l1_offset % cluster or (l1_offset == 0 and l1_size):
        raise refuse("its L1 table is not where it can be")
    data = _data_size(image, l1_offset, l1_size, cluster, entry_size)
    return Inspected(size, min(data, -(-size // cluster) * cluster))


def _features(image: Image, version: int, cluster: int) -> int:
    """The incompatible features of version 3, after a look at the header's extensions."""
    features, length = 0, 72
    if version == 3:
        features, _, _, refcount_order, length = image.unpack(">QQQII", 72, "header")
        if features & _DATA_FILE:
            raise refuse("its data is in another file, which it names")
        if features & _CORRUPT:
            raise refuse("it is marked as corrupt")
        if features & ~(_DIRTY | _COMPRESSION | _EXTENDED_L2):
            raise refuse(f"it has features that are not known ({features:#x})")
        if refcount_order > 6 or length < 104 or length > cluster or length % 8:
            raise refuse("its header is malformed")
    at = length
    while at + 8 <= min(cluster, image.size):
        kind, size = image.unpack(">II", at, "header extension")
        if kind == 0:
            break
        if kind in (_DATA_FILE_NAME, _BACKING_FORMAT):
            raise refuse("it names another file")
        if kind == _FULL_ENCRYPTION:
            raise refuse("it is encrypted")
        at += 8 + (size + 7) // 8 * 8
        if at > cluster:
            raise refuse("its header extensions are malformed")
    return features


def _entries(data: bytes) -> array[int]:
    table = array("Q", data)
    if sys.byteorder == "little":
        table.byteswap()
    return table


def _data_size(image: Image, offset: int, count: int, cluster: int, entry_size: int) -> int:
    """Bytes of the disk that have data; every table and cluster is checked to be in the file.

    QEMU reads clusters beyond the end of a truncated file as zeros, silently.
    """
    tables = Counter(
        entry & _OFFSET for entry in _entries(image.read(offset, count * 8, "L1 table"))
    )
    del tables[0]
    total = 0
    for table, uses in tables.items():
        if table % cluster:
            raise refuse("one of its L2 tables is not aligned")
        total += uses * _l2_data(image, table, cluster, entry_size)
    return total


def _l2_data(image: Image, offset: int, cluster: int, entry_size: int) -> int:
    entries = _entries(image.read(offset, cluster, "L2 table"))
    if entry_size == 16:
        entries = entries[::2]  # every second word is a bitmap of subclusters
    used = 0
    compressed_shift = 62 - (cluster.bit_length() - 1 - 8)
    for entry in entries:
        if entry == 0:
            continue
        if entry & _COMPRESSED:
            start = entry & ((1 << compressed_shift) - 1)
        else:
            start = entry & _OFFSET
            if start % cluster:
                raise refuse("one of its clusters is not aligned")
            if start == 0 or (entry_size == 8 and entry & _ZERO):
                continue
        if start >= image.size:
            raise refuse("some of its data lies outside of the file (is it truncated?)")
        used += cluster
    return used


def is_qcow2(head: bytes) -> bool:
    """Whether a file that begins so is meant as qcow2."""
    return head[:4] == MAGIC and struct.unpack(">I", head[4:8].ljust(4, b"\0"))[0] in (2, 3)
