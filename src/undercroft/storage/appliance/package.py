"""A file that holds a VM or a disk: looked into, with everything checked that can be checked
without reading all of it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field

from undercroft.model.appliance import Appliance, ApplianceDisk, AppliancePort
from undercroft.model.errors import InvalidError
from undercroft.model.image import DiskFormat
from undercroft.model.vm import Firmware
from undercroft.storage.appliance.manifest import MAX_MANIFEST, Checksums, read_manifest
from undercroft.storage.appliance.ovf import OvfDisk, read_descriptor
from undercroft.storage.appliance.tar import Member, is_tar, plain_name, read_members, refused
from undercroft.storage.appliance.xml import MAX_XML
from undercroft.storage.formats import Limits, inspect, recognise
from undercroft.storage.formats.common import Image
from undercroft.storage.formats.vmdk import DESCRIPTOR
from undercroft.storage.formats.vmdk_extents import (
    MAX_DESCRIPTOR,
    Extent,
    check_extents,
    read_extents,
)

__all__ = ["DiskSource", "Package", "open_package"]

_GZIP = b"\x1f\x8b"
_XML = re.compile(rb"(\xef\xbb\xbf)?\s*<[?!A-Za-z]")  # VDI begins with <<<


@dataclass(frozen=True)
class DiskSource:
    """Where a disk is in the file: ``size`` bytes from ``offset`` on, in a format; or in several
    ``extents``, each in a member of the archive. ``packed``: compressed with gzip, and its format
    is seen only when it is not any more."""

    offset: int
    size: int
    format: DiskFormat
    virtual_size: int
    data_size: int
    packed: bool = False
    extents: tuple[Extent, ...] = ()


@dataclass
class Package:
    """What was found: ``sources`` are those of the appliance's disks (None: an empty disk)."""

    appliance: Appliance
    sources: list[DiskSource | None]
    members: dict[str, Member] = field(default_factory=dict)
    checksums: Checksums = field(default_factory=dict)
    nvram: Member | None = None
    image: str | None = None
    arch: str = "x86_64"


def open_package(
    fd: int,
    name: str,
    *,
    format: DiskFormat | None = None,
    system: str | None = None,
    limits: Limits | None = None,
) -> Package:
    """Looks into an open file called ``name``. ``format``: that of a lone disk, as stated by its
    user; ``system``: which VM of several. Blocks.

    Raises:
        HostileImageError: malformed, truncated, beyond a limit, or it reaches outside of itself.
        InvalidError: it is not known what it is, or something has to be said.
    """
    limits = limits or Limits()
    size = os.fstat(fd).st_size
    head = os.pread(fd, 512, 0)
    if not head:
        raise refused("the file is empty")
    if format is None and is_tar(head):
        members = {member.name: member for member in read_members(fd, size)}
        return _archive(fd, members, name, system, limits)
    if format is None and _XML.match(head):
        raise InvalidError(
            f"{name[:80]} is a descriptor without the disks that it describes",
            action="give croft the .ovf with its disks beside it, or make an OVA of them",
        )
    whole = Member(name, 0, size)
    source = _disk(fd, whole, format or recognise(fd, name=name), limits, {})
    disk = ApplianceDisk(file=name, size=source.virtual_size, format=source.format)
    return Package(
        Appliance(name=name, disks=(disk,), ports=(AppliancePort(network=""),)), [source]
    )


def _archive(
    fd: int, members: dict[str, Member], name: str, system: str | None, limits: Limits
) -> Package:
    descriptors = [member for member in members.values() if member.name.lower().endswith(".ovf")]
    if not descriptors:
        return _disk_set(fd, members, name, limits)
    if len(descriptors) > 1:
        raise refused("it has several descriptors")
    stem = descriptors[0].name[:-4]
    found = read_descriptor(_content(fd, descriptors[0], MAX_XML), system, members.keys())
    manifest = _companion(members, stem, ".mf")
    checksums: Checksums = {}
    if manifest is not None:
        checksums = read_manifest(_content(fd, manifest, MAX_MANIFEST))
        for listed in checksums:
            if plain_name(listed) not in members:
                raise refused(f"its manifest has {listed[:80]!r}, which there is not")
    certificate = _companion(members, stem, ".cert")
    notes = found.notes
    sources: list[DiskSource | None] = []
    disks: list[ApplianceDisk] = []
    for disk in found.disks:
        source = _ovf_disk(fd, disk, members, limits, notes)
        sources.append(source)
        disks.append(
            ApplianceDisk(
                file=disk.file.name if disk.file is not None else None,
                size=source.virtual_size if source is not None else disk.size,
                format=source.format if source is not None else None,
                bus=disk.bus,
            )
        )
    used = {file.name for file in found.files.values()}
    for entry in found.files.values():
        _member(members, entry.name, entry.size)
    beside = {descriptors[0].name, *(m.name for m in (manifest, certificate) if m is not None)}
    if manifest is not None:
        unlisted = (used | {descriptors[0].name}) - checksums.keys()
        if unlisted:
            raise refused(f"its manifest leaves out {sorted(unlisted)[0][:80]!r}")
    notes += [f"file {n[:60]} is left out" for n in members if n not in used | beside]
    if certificate is not None:
        notes.append("it is signed, but signatures are not checked here")
    if manifest is None:
        notes.append("it has no manifest: nothing tells whether it is as it was made")
    appliance = Appliance(
        name=found.name[:120] or stem[:120],
        system=found.system,
        product=found.product,
        cpus=found.hardware.cpus,
        memory=found.hardware.memory,
        firmware=found.firmware,
        secure_boot=found.secure_boot,
        tpm=found.hardware.tpm,
        disks=tuple(disks),
        cdroms=tuple(found.hardware.cdroms),
        ports=tuple(found.hardware.ports),
        manifest=next(iter(checksums.values()))[0] if checksums else None,
        signed=certificate is not None,
        notes=tuple(dict.fromkeys(note for note in notes if note)),
    )
    nvram = members.get(found.nvram) if found.nvram and found.firmware is Firmware.UEFI else None
    return Package(appliance, sources, members, checksums, nvram, found.image, found.arch)


def _companion(members: dict[str, Member], stem: str, suffix: str) -> Member | None:
    own = members.get(stem + suffix)
    others = [m for m in members.values() if m.name.lower().endswith(suffix) and m is not own]
    if others:
        raise refused(f"{others[0].name[:80]!r} goes with no descriptor of it")
    return own


def _ovf_disk(
    fd: int, disk: OvfDisk, members: dict[str, Member], limits: Limits, notes: list[str]
) -> DiskSource | None:
    """Where a disk is; None: it is empty. What is stated of it and what its file says must fit."""
    if disk.file is None:
        if not 0 < disk.size <= limits.virtual_size:
            raise refused("the size of a disk of it is not possible")
        return None
    member = _member(members, disk.file.name, disk.file.size)
    compression = disk.file.compression
    if compression not in ("", "identity", "gzip"):
        raise refused(f"{member.name[:60]!r} is compressed with {compression[:20]!r}")
    if member.size == 0:
        raise refused(f"{member.name[:60]!r} is empty")
    if compression == "gzip":
        if not 0 < disk.size <= limits.virtual_size:
            raise refused(f"nothing tells how large the disk in {member.name[:60]!r} is")
        if os.pread(fd, 2, member.offset) != _GZIP:
            raise refused(f"{member.name[:60]!r} is not compressed as its descriptor says")
        return DiskSource(
            member.offset, member.size, DiskFormat.VMDK, disk.size, disk.size, packed=True
        )
    source = _disk(fd, member, recognise(fd, member.offset), limits, members)
    if disk.size and source.virtual_size > disk.size:
        raise refused(
            f"the disk in {member.name[:60]!r} has {source.virtual_size} bytes, and its descriptor "
            f"says {disk.size}"
        )
    if disk.size and source.virtual_size < disk.size:
        notes.append(f"the disk in {member.name[:40]} is smaller than its descriptor says")
    return source


def _member(members: dict[str, Member], name: str, size: int | None) -> Member:
    member = members.get(name)
    if member is None:
        raise refused(f"it lacks {name[:80]!r}")
    if size is not None and size != member.size:
        raise refused(
            f"{name[:80]!r} has {member.size} bytes in the archive, and its descriptor says {size}"
        )
    return member


def _disk(
    fd: int, member: Member, format: DiskFormat, limits: Limits, members: dict[str, Member]
) -> DiskSource:
    span = (member.offset, member.size)
    if format is DiskFormat.VMDK and os.pread(fd, len(DESCRIPTOR), member.offset) == DESCRIPTOR:
        extents = read_extents(_content(fd, member, MAX_DESCRIPTOR))

        def image_of(name: str) -> Image:
            if plain_name(name) not in members:
                raise refused(f"its data is in {name[:80]!r}, which does not come with it")
            found = members[plain_name(name)]
            return Image(fd, found.size, found.offset)

        size = check_extents(extents, image_of, limits)
        return DiskSource(*span, format, size, size, extents=tuple(extents))
    found = inspect(fd, format, limits, span)
    return DiskSource(*span, format, found.virtual_size, found.data_size)


def _disk_set(fd: int, members: dict[str, Member], name: str, limits: Limits) -> Package:
    """A disk in several files, which croft has put into an archive for the way."""
    heads = [
        member
        for member in members.values()
        if os.pread(fd, len(DESCRIPTOR), member.offset) == DESCRIPTOR
    ]
    if len(heads) != 1:
        raise refused("it has no descriptor (.ovf)")
    source = _disk(fd, heads[0], DiskFormat.VMDK, limits, members)
    disk = ApplianceDisk(file=heads[0].name, size=source.virtual_size, format=source.format)
    appliance = Appliance(name=name, disks=(disk,), ports=(AppliancePort(network=""),))
    return Package(appliance, [source], members)


def _content(fd: int, member: Member, most: int) -> bytes:
    if member.size > most:
        raise refused(f"{member.name[:80]!r} is too large for what it is")
    data = os.pread(fd, member.size, member.offset)
    if len(data) != member.size:
        raise refused("it became shorter while it was read")
    return data
