"""VMDK in several files: a descriptor, and the extents that it names (VMware, "Virtual Disk
Format 5.0"). QEMU never sees any of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from undercroft.storage.formats.common import Image, Limits, check_virtual_size, refuse
from undercroft.storage.formats.vmdk import DESCRIPTOR, inspect_extent

__all__ = ["MAX_DESCRIPTOR", "Extent", "check_extents", "read_extents"]

MAX_DESCRIPTOR = 1 << 20
SECTOR = 512
_FLAT = ("monolithicFlat", "twoGbMaxExtentFlat", "vmfs")
_SPARSE = ("twoGbMaxExtentSparse", "monolithicSparse")
_LINE = re.compile(
    r'(RW|RDONLY|NOACCESS)\s+(\d{1,15})\s+(FLAT|VMFS|SPARSE|ZERO)(?:\s+"([^"]*)"(?:\s+(\d{1,15}))?)?'
)
_MOST = 1000


@dataclass(frozen=True)
class Extent:
    """Part of a disk: its sectors, and the file that they are in (from a sector on, if flat)."""

    kind: str
    sectors: int
    file: str
    offset: int = 0


def read_extents(data: bytes) -> list[Extent]:
    """The extents that a descriptor names.

    Raises:
        HostileImageError: malformed, of a type that is not known, or it has a parent.
    """
    if not data.startswith(DESCRIPTOR) or len(data) > MAX_DESCRIPTOR:
        raise refuse("it is not the descriptor of a VMDK")
    values: dict[str, str] = {}
    extents: list[Extent] = []
    for line in data.partition(b"\0")[0].decode("utf-8", "replace").splitlines():
        line = line.strip()
        if re.match(r"(RW|RDONLY|NOACCESS)\s", line):
            match = _LINE.fullmatch(line)
            if match is None or match[1] == "NOACCESS" or len(extents) >= _MOST:
                raise refuse(f"an extent makes no sense: {line[:80]!r}")
            kind = "FLAT" if match[3] == "VMFS" else match[3]
            extents.append(Extent(kind, int(match[2]), match[4] or "", int(match[5] or 0)))
        elif (found := re.fullmatch(r'([\w.]+)\s*=\s*"?([^"]*?)"?', line)) is not None:
            values[found[1]] = found[2]
    if values.get("parentCID", "ffffffff").lower() != "ffffffff" or "parentFileNameHint" in values:
        raise refuse("it has a parent: its data is in another disk")
    if values.get("createType") not in (*_FLAT, *_SPARSE):
        raise refuse(f"a VMDK of type {values.get('createType', 'unknown')[:40]!r} is not taken")
    if not extents:
        raise refuse("its descriptor names no extent")
    return extents


def check_extents(
    extents: Sequence[Extent], image_of: Callable[[str], Image], limits: Limits
) -> int:
    """The size of the disk in bytes. ``image_of`` gives the file of an extent.

    Raises:
        HostileImageError: a file is missing or smaller than it should be.
    """
    total = 0
    for extent in extents:
        if extent.sectors <= 0:
            raise refuse("an extent of it has no size")
        total += extent.sectors * SECTOR
        check_virtual_size(total, limits)
        if extent.kind == "ZERO":
            continue
        image = image_of(extent.file)
        if extent.kind == "FLAT":
            if (extent.offset + extent.sectors) * SECTOR > image.size:
                raise refuse(f"{extent.file[:60]} is smaller than it should be (truncated?)")
        elif inspect_extent(image, limits) < extent.sectors * SECTOR or extent.offset:
            raise refuse(f"{extent.file[:60]} is smaller than it should be")
    return check_virtual_size(total, limits)
