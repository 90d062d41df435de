"""Which format a file has, and whether it can be taken."""

from __future__ import annotations

import os
import struct

from undercroft.model.disc import DISC_AT, DISC_SIZE, is_disc
from undercroft.model.errors import InvalidError
from undercroft.model.image import DiskFormat
from undercroft.storage.formats import microsoft, qcow2, vdi, vmdk
from undercroft.storage.formats.common import (
    Image,
    Inspected,
    Limits,
    check_virtual_size,
    refuse,
)

__all__ = ["inspect", "recognise"]

_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"7z\xbc\xaf": "7z",
}


def recognise(fd: int, start: int = 0, name: str = "") -> DiskFormat:
    """The format of an image that begins at ``start`` of an open file, by its magic number.

    Raw has none: a raw disk could begin with whatever the guest wrote there, so it has to be stated
    (CVE-2008-2004 and many since are about guessing here). ``name`` is that of the file, for hints.

    Raises:
        InvalidError: no magic number is known, or it is a compressed file or a disc.
    """
    head = os.pread(fd, 512, start)
    if qcow2.is_qcow2(head):
        return DiskFormat.QCOW2
    if head.startswith((vmdk.MAGIC, vmdk.DESCRIPTOR)):
        return DiskFormat.VMDK
    if head.startswith(microsoft.VHDX_MAGIC):
        return DiskFormat.VHDX
    if head.startswith(microsoft.VHD_MAGIC):
        return DiskFormat.VPC
    if head[vdi.SIGNATURE_AT : vdi.SIGNATURE_AT + 4] == vdi.SIGNATURE:
        return DiskFormat.VDI
    for magic, packer in _ARCHIVES.items():
        if head.startswith(magic):
            raise InvalidError(
                f"the image is compressed ({packer})",
                action=f"unpack it first (it is a {packer} file)",
            )
    if is_disc(os.pread(fd, DISC_SIZE, start + DISC_AT)):
        raise InvalidError(
            "the image is one of a disc (CD, DVD), not of a disk",
            action="put it into a drive: croft run --disk 20G --cdrom FILE, croft cdrom insert",
        )
    if name.lower().endswith(".iso"):
        raise InvalidError(
            "it is called .iso, but is neither a disc (CD, DVD) nor a disk that is known",
            action="fetch it anew; a disc goes into a drive: croft run --disk 20G --cdrom FILE",
        )
    raise InvalidError(
        "the format of the image cannot be told from its content",
        action="state it: --format raw if it is the bare content of a disk",
    )


def inspect(
    fd: int, format: DiskFormat, limits: Limits, span: tuple[int, int] | None = None
) -> Inspected:
    """Checks an open image of a stated format. Blocks. ``span``: offset and length of the part of
    the file that is the image.

    Raises:
        HostileImageError: it is not in that format, malformed, beyond a limit, or refers to
            anything outside of itself.
    """
    start, length = span or (0, os.fstat(fd).st_size)
    image = Image(fd, length, start)
    if image.size == 0:
        raise refuse("the file is empty")
    try:
        match format:
            case DiskFormat.RAW:
                size = check_virtual_size(-(-image.size // 512) * 512, limits)
                return Inspected(size, min(size, os.fstat(fd).st_blocks * 512))
            case DiskFormat.QCOW2:
                return qcow2.inspect(image, limits)
            case DiskFormat.VMDK:
                return vmdk.inspect(image, limits)
            case DiskFormat.VPC:
                return microsoft.inspect_vhd(image, limits)
            case DiskFormat.VHDX:
                return microsoft.inspect_vhdx(image, limits)
            case DiskFormat.VDI:
                return vdi.inspect(image, limits)
    except (struct.error, OverflowError, ValueError) as error:
        raise refuse(f"it is malformed ({error})") from error
