"""VDI, VirtualBox's format, as QEMU reads it (block/vdi.c)."""

from __future__ import annotations

from undercroft.storage.formats.common import Image, Inspected, Limits, check_virtual_size, refuse

SIGNATURE = b"\x7f\x10\xda\xbe"
SIGNATURE_AT = 64
_DYNAMIC, _STATIC = 1, 2
_UNUSED = bytes(16)


def inspect(image: Image, limits: Limits) -> Inspected:
    """Checks the header.

    Raises:
        HostileImageError: not VDI, or it has a parent, or malformed.
    """
    signature, version, _length, kind = image.unpack("<4sIII", SIGNATURE_AT, "header")
    if signature != SIGNATURE:
        raise refuse("it is not in VDI format")
    if version != 0x00010001:
        raise refuse(f"VDI version {version:#x} is not known")
    if kind not in (_DYNAMIC, _STATIC):
        raise refuse("it is a differencing disk: its data is in another file")
    blocks_at, data_at = image.unpack("<II", 340, "header")
    size, block, extra, blocks, used = image.unpack("<QIIII", 368, "header")
    parent = image.read(440, 16, "header")
    if parent != _UNUSED:
        raise refuse("it has a parent: its data is in another file")
    check_virtual_size(size, limits)
    if block != 1 << 20 or extra or blocks * block < size or blocks > 0x1FFFFFFF or used > blocks:
        raise refuse("its block table is not possible")
    if blocks_at + blocks * 4 > image.size or data_at > image.size:
        raise refuse("its block table lies outside of the file (is it truncated?)")
    if data_at + used * block > image.size:
        raise refuse("some of its data lies outside of the file (is it truncated?)")
    return Inspected(size, used * block)
