"""VHD ("vpc") and VHDX, as of Microsoft's specifications of the two ([MS-VHDX] for the latter)."""

from __future__ import annotations

import uuid

from undercroft.storage.formats.common import Image, Inspected, Limits, check_virtual_size, refuse

VHD_MAGIC = b"conectix"
VHDX_MAGIC = b"vhdxfile"

_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4
_METADATA = uuid.UUID("8B7CA206-4790-4B9A-B8FE-575F050F886E")
_FILE_PARAMETERS = uuid.UUID("CAA16737-FA36-4D43-B3B6-33F0AA44E76B")
_VIRTUAL_SIZE = uuid.UUID("2FA54224-CD1B-4876-B211-5DBED83BF4B8")
_PARENT_LOCATOR = uuid.UUID("A8D35F2D-B30B-454D-ABF7-D3D84834AB0C")
_REGION_TABLES = (192 << 10, 256 << 10)


def inspect_vhd(image: Image, limits: Limits) -> Inspected:
    """Checks the footer, or the copy of it that a dynamic disk begins with.

    Raises:
        HostileImageError: not VHD, or a differencing disk, or malformed.
    """
    offset = 0
    if image.size < 512 or image.read(0, 8, "header") != VHD_MAGIC:
        offset = image.size - 512
    magic, data_offset = image.unpack(">8s8xQ", offset, "footer")
    size, kind = image.unpack(">Q4xI", offset + 48, "footer")
    if magic != VHD_MAGIC:
        raise refuse("it is not in VHD format")
    if kind == _DIFFERENCING:
        raise refuse("it is a differencing disk: its data is in another file")
    if kind not in (_FIXED, _DYNAMIC):
        raise refuse(f"a VHD of type {kind} is not known")
    check_virtual_size(size, limits)
    if kind == _FIXED:
        if size > image.size:
            raise refuse("it is shorter than its disk (is it truncated?)")
        return Inspected(size, size)
    cookie, _, table, _, entries, block = image.unpack(">8sQQIII", data_offset, "dynamic header")
    if cookie != b"cxsparse":
        raise refuse("its dynamic header is malformed")
    if not 512 <= block <= 1 << 30 or block & (block - 1) or entries * block < size:
        raise refuse("its block table is not possible")
    image.read(table, min(entries * 4, 512), "block table")
    if table + entries * 4 > image.size:
        raise refuse("its block table lies outside of the file (is it truncated?)")
    return Inspected(size, size)


def inspect_vhdx(image: Image, limits: Limits) -> Inspected:
    """Checks region and metadata tables.

    Raises:
        HostileImageError: not VHDX, or it has a parent, or malformed.
    """
    if image.read(0, 8, "header") != VHDX_MAGIC:
        raise refuse("it is not in VHDX format")
    sizes = {_vhdx_size(image, table) for table in _REGION_TABLES}
    sizes.discard(None)
    if len(sizes) != 1:
        raise refuse("its region tables are missing or contradict one another")
    size = check_virtual_size(next(iter(sizes)) or 0, limits)
    return Inspected(size, size)


def _vhdx_size(image: Image, table: int) -> int | None:
    """The disk's size by one of the two region tables; None if that one is not in use."""
    magic, _, count = image.unpack("<4sII", table, "region table")
    if magic != b"regi":
        return None
    if count > 2047:
        raise refuse("its region table is malformed")
    for index in range(count):
        guid, offset, _length = image.unpack("<16sQI", table + 16 + index * 32, "region table")
        if uuid.UUID(bytes_le=guid) == _METADATA:
            return _vhdx_metadata(image, offset)
    raise refuse("it has no metadata")


def _vhdx_metadata(image: Image, start: int) -> int:
    magic, count = image.unpack("<8s2xH", start, "metadata table")
    if magic != b"metadata" or count > 2047:
        raise refuse("its metadata table is malformed")
    size = 0
    for index in range(count):
        guid, offset, _length = image.unpack("<16sII", start + 32 + index * 32, "metadata table")
        item = uuid.UUID(bytes_le=guid)
        if item == _VIRTUAL_SIZE:
            (size,) = image.unpack("<Q", start + offset, "metadata")
        elif item == _FILE_PARAMETERS:
            _block, flags = image.unpack("<II", start + offset, "metadata")
            if flags & 2:
                raise refuse("it is a differencing disk: its data is in another file")
        elif item == _PARENT_LOCATOR:
            raise refuse("it is a differencing disk: its data is in another file")
    return size
