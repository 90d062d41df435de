"""VMDK in one file (monolithicSparse, streamOptimized).

As of VMware's "Virtual Disk Format 5.0". Disks in several files are refused: their descriptors
name other files.
"""

from __future__ import annotations

import re

from undercroft.storage.formats.common import Image, Inspected, Limits, check_virtual_size, refuse

MAGIC = b"KDMV"
DESCRIPTOR = b"# Disk DescriptorFile"
_SECTOR = 512
_AT_END = 0xFFFFFFFFFFFFFFFF
_TYPES = ("monolithicSparse", "streamOptimized")
# QEMU reads this many bytes of the descriptor, whatever the header says (DESC_SIZE).
_READ_BY_QEMU = 20 * _SECTOR
_MAX_DESCRIPTOR = 64 << 10


def inspect(image: Image, limits: Limits) -> Inspected:
    """Checks the header, the footer if there is one, and the descriptor inside.

    Raises:
        HostileImageError: not such a VMDK, or it refers to another file.
    """
    head = image.read(0, min(image.size, 64), "header")
    if head.startswith(DESCRIPTOR):
        raise refuse("it is only a descriptor that names other files")
    directory = _check_header(image, 0, limits)
    if directory == _AT_END:
        directory = _check_header(image, image.size - 2 * _SECTOR, limits)
        if directory == _AT_END:
            raise refuse("its footer is malformed")
    (capacity,) = image.unpack("<Q", 12, "header")
    return Inspected(capacity * _SECTOR, capacity * _SECTOR)


def inspect_extent(image: Image, limits: Limits) -> int:
    """Checks one extent of a disk in several files, which has no descriptor of its own; its size
    in bytes.

    Raises:
        HostileImageError: malformed, or compressed.
    """
    if _check_header(image, 0, limits, alone=False) == _AT_END:
        raise refuse("an extent of it is a stream of its own")
    (capacity,) = image.unpack("<Q", 12, "header")
    return int(capacity) * _SECTOR


def _check_header(image: Image, offset: int, limits: Limits, alone: bool = True) -> int:
    """Checks a header or footer; returns where it says that the grain directory is (sectors)."""
    magic, version, _flags, capacity, grain, start, length, entries = image.unpack(
        "<4sIIQQQQI", offset, "header"
    )
    (directory,) = image.unpack("<Q", offset + 56, "header")
    if magic != MAGIC:
        raise refuse("it is not in VMDK format")
    if version not in (1, 2, 3):
        raise refuse(f"VMDK version {version} is not known")
    # QEMU takes a capacity of 0 to mean that the descriptor names the files with the data.
    if not 0 < capacity <= limits.virtual_size:
        raise refuse("the size of its disk is not possible")
    check_virtual_size(capacity * _SECTOR, limits)
    if not 0 < grain <= 128 * 1024 or grain & (grain - 1) or not 0 < entries <= 512:
        raise refuse("its header is malformed")
    if directory != _AT_END and directory * _SECTOR >= image.size:
        raise refuse("its grain directory lies outside of the file (is it truncated?)")
    if start == 0 and offset == 0 and alone:
        raise refuse("it has no descriptor")
    if start and alone:  # QEMU does not look at that of an extent
        _check_descriptor(image, start * _SECTOR, length * _SECTOR)
    return int(directory)


def _check_descriptor(image: Image, start: int, length: int) -> None:
    if length > _MAX_DESCRIPTOR:
        raise refuse("its descriptor is too large")
    end = min(start + max(length, _READ_BY_QEMU), image.size)
    text = image.read(start, max(end - start, 0), "descriptor")
    if b"parentFileNameHint" in text:
        raise refuse("it has a parent: it would show the guest another file of this host")
    text = text[:length].partition(b"\0")[0]
    lines = [line.strip() for line in text.decode("latin-1").splitlines()]
    values: dict[str, str] = {}
    for line in lines:
        match = re.fullmatch(r'(\w+)\s*=\s*"?([^"]*?)"?', line)
        if match is not None:
            values[match[1]] = match[2]
    if values.get("parentCID", "ffffffff").lower() != "ffffffff":
        raise refuse("it has a parent: it would show the guest another file of this host")
    if values.get("createType") not in _TYPES:
        raise refuse(f"a VMDK of type {values.get('createType', 'unknown')[:40]!r} is not taken")
    extents = [line for line in lines if re.match(r"(RW|RDONLY|NOACCESS)\s", line)]
    if len(extents) != 1 or " SPARSE " not in extents[0]:
        raise refuse("its data is in other files")
