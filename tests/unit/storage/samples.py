"""Disk images made by hand, byte by byte, to be spoilt one field at a time."""

from __future__ import annotations

import struct
import uuid
from typing import Any

CLUSTER = 65536


def qcow2(
    *,
    version: int = 3,
    size: int = 1 << 20,
    backing: bytes = b"",
    cluster_bits: int = 16,
    crypt: int = 0,
    l1_size: int | None = None,
    l1_offset: int = 3 * CLUSTER,
    refcount_offset: int = CLUSTER,
    refcount_clusters: int = 1,
    snapshots: int = 0,
    incompatible: int = 0,
    refcount_order: int = 4,
    extensions: bytes = b"",
    l2_entry: int = 5 * CLUSTER,
    data: bytes = b"x" * CLUSTER,
) -> bytes:
    """A small qcow2: header, refcount table and block, L1, one L2 and one cluster of data."""
    backing_offset = 0x400 if backing else 0
    if l1_size is None:
        l1_size = max(1, -(-size // (CLUSTER * CLUSTER // 8)))
    header = struct.pack(
        ">4sIQIIQIIQQIIQ", b"QFI\xfb", version, backing_offset, len(backing), cluster_bits, size,
        crypt, l1_size, l1_offset, refcount_offset, refcount_clusters, snapshots, 0,
    )  # fmt: skip
    if version >= 3:
        header += struct.pack(">QQQII", incompatible, 0, 0, refcount_order, 104)
    header += extensions + bytes(8)
    file = bytearray(5 * CLUSTER)
    file[: len(header)] = header
    file[0x400 : 0x400 + len(backing)] = backing
    struct.pack_into(">Q", file, CLUSTER, 2 * CLUSTER)
    for cluster in range(6):
        struct.pack_into(">H", file, 2 * CLUSTER + 2 * cluster, 1)
    struct.pack_into(">Q", file, 3 * CLUSTER, 4 * CLUSTER | 1 << 63)
    struct.pack_into(">Q", file, 4 * CLUSTER, l2_entry | (1 << 63 if l2_entry else 0))
    return bytes(file) + data


def extension(kind: int, content: bytes) -> bytes:
    """A qcow2 header extension."""
    return struct.pack(">II", kind, len(content)) + content + bytes(-len(content) % 8)


def vmdk(
    *,
    capacity: int = 2048,
    descriptor: str | None = None,
    grain: int = 128,
    directory: int = 21,
    start: int = 1,
    length: int = 20,
) -> bytes:
    """A monolithicSparse VMDK without any grain."""
    if descriptor is None:
        descriptor = (
            "# Disk DescriptorFile\nversion=1\nCID=12345678\nparentCID=ffffffff\n"
            'createType="monolithicSparse"\n\n'
            f'RW {capacity} SPARSE "disk.vmdk"\n'
        )
    header = struct.pack(
        "<4sIIQQQQIQQQB4sH", b"KDMV", 1, 3, capacity, grain, start, length, 512, directory,
        directory, 128, 0, b"\n \r\n", 0,
    )  # fmt: skip
    file = bytearray(256 * 512)
    file[: len(header)] = header
    file[512 : 512 + len(descriptor)] = descriptor.encode()
    return bytes(file)


def vhd(*, kind: int = 2, size: int = 1 << 20, **_: Any) -> bytes:
    """A VHD: fixed, or (kind 3 and 4) the head of a dynamic one."""
    footer = bytearray(512)
    struct.pack_into(">8sIIQ", footer, 0, b"conectix", 2, 0x10000, 512)
    struct.pack_into(">QQII", footer, 40, size, size, 0, kind)
    if kind == 2:
        return bytes(size) + bytes(footer)
    dynamic = bytearray(1024)
    struct.pack_into(
        ">8sQQIII", dynamic, 0, b"cxsparse", 0xFFFFFFFFFFFFFFFF, 1536, 0x10000, 1, 2 << 20
    )
    return bytes(footer + dynamic) + b"\xff" * 512 + bytes(footer)


def vdi(*, size: int = 1 << 20, kind: int = 1, parent: bytes = bytes(16)) -> bytes:
    """A VDI with one block, allocated."""
    file = bytearray(1 << 20)
    struct.pack_into("<4sIII", file, 64, b"\x7f\x10\xda\xbe", 0x00010001, 0x190, kind)
    struct.pack_into("<II", file, 340, 0x200, 1 << 20)
    struct.pack_into(
        "<QIIII", file, 368, size, 1 << 20, 0, min(-(-size // (1 << 20)), 0xFFFFFFFF), 1
    )
    file[440:456] = parent
    return bytes(file) + b"d" * (1 << 20)


def vhdx(*, size: int = 1 << 20, flags: int = 0, parent: bool = False) -> bytes:
    """The tables of a VHDX (it has no data)."""
    file = bytearray(4 << 20)
    file[:8] = b"vhdxfile"
    metadata = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E").bytes_le
    for table in (192 << 10, 256 << 10):
        struct.pack_into("<4sIII", file, table, b"regi", 0, 1, 0)
        struct.pack_into("<16sQII", file, table + 16, metadata, 2 << 20, 1 << 20, 1)
    start = 2 << 20
    items = [
        ("CAA16737-FA36-4D43-B3B6-33F0AA44E76B", struct.pack("<II", 1 << 20, flags)),
        ("2FA54224-CD1B-4876-B211-5DBED83BF4B8", struct.pack("<Q", size)),
    ]
    if parent:
        items.append(("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C", b"path"))
    struct.pack_into("<8sHH", file, start, b"metadata", 0, len(items))
    for index, (guid, data) in enumerate(items):
        place = 0x10000 + index * 64
        struct.pack_into(
            "<16sIII", file, start + 32 + index * 32, uuid.UUID(guid).bytes_le, place, len(data), 4
        )
        file[start + place : start + place + len(data)] = data
    return bytes(file)
