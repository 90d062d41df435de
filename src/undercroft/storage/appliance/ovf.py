"""Descriptors (DSP0243, "Open Virtualization Format Specification", versions 1 and 2), read.

What is known is taken, what is known to be of no use here is noted, and what is neither is refused
if the descriptor says that it is required (which it is unless it says otherwise).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from urllib.parse import unquote

from undercroft.model.appliance import AppliancePort
from undercroft.model.errors import InvalidError
from undercroft.model.vm import DiskBus, Firmware, NicModel
from undercroft.storage.appliance.hardware import (
    ADAPTER,
    Hardware,
    number,
    read_hardware,
    units,
)
from undercroft.storage.appliance.tar import plain_name, refused
from undercroft.storage.appliance.xml import Element, parse

__all__ = ["OWN", "Descriptor", "OvfDisk", "OvfFile", "plain_reference", "read_descriptor"]

OWN = "urn:undercroft:machine:1"
"""Namespace of what of our VMs has no place elsewhere in a descriptor."""
_MOST_DISKS = 64
_ENVELOPE = re.compile(r"http://schemas\.dmtf\.org/ovf/(envelope/[12]|[12]/envelope)/?")
_KNOWN = {
    "References", "DiskSection", "NetworkSection", "Strings", "VirtualSystem",
    "VirtualSystemCollection", "Info", "Name", "VirtualHardwareSection", "OperatingSystemSection",
}  # fmt: skip
_OF_HARDWARE = ("Info", "System", "Transport", "Config", "ExtraConfig")
_TOLD = {
    "AnnotationSection": "",
    "ProductSection": "",
    "DeploymentOptionSection": "",
    "EulaSection": "it comes with a licence agreement: read it in the descriptor",
    "InstallSection": "it wants to be booted once to install itself: start it when you like",
    "StartupSection": "the order in which its VMs start is left out",
    "ResourceAllocationSection": "reservations and limits are left out",
}


@dataclass(frozen=True)
class OvfFile:
    """A file of the package, by its plain ``name``; ``size`` as stated, None if it is not."""

    name: str
    size: int | None
    compression: str


@dataclass(frozen=True)
class OvfDisk:
    """A disk of ``size`` bytes (0: as large as its file says), in a ``file`` (None: empty)."""

    size: int
    file: OvfFile | None
    bus: DiskBus


@dataclass
class Descriptor:
    """What a descriptor says, in our terms."""

    name: str = ""
    system: str = ""
    product: str = ""
    hardware: Hardware = field(default_factory=Hardware)
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    disks: list[OvfDisk] = field(default_factory=list)
    files: dict[str, OvfFile] = field(default_factory=dict)
    nvram: str | None = None
    image: str | None = None  # digest of the image whose kernel it boots
    arch: str = "x86_64"
    notes: list[str] = field(default_factory=list)


def read_descriptor(
    data: bytes, system: str | None = None, names: Collection[str] = ()
) -> Descriptor:
    """What a descriptor says of its VM, or of that ``system`` of several. ``names``: of the files
    that come with it.

    Raises:
        HostileImageError: it is malformed, needs something that cannot be had, or reaches outside
            of the package.
        InvalidError: which VM is meant has to be said.
    """
    root = parse(data)
    if root.name != "Envelope" or _ENVELOPE.fullmatch(root.space) is None:
        raise refused("its descriptor is no OVF envelope of version 1 or 2")
    found = Descriptor()
    found.files = _files(root, names)
    machine = _machine(root, system, found)
    _check_sections(root, found)
    _check_sections(machine, found)
    found.name = machine.value("Name") or machine.attributes.get("id", "")
    _read_texts(machine, found)
    sections = list(machine.all("VirtualHardwareSection"))
    if not sections:
        raise refused("its descriptor says nothing of the hardware")
    if len(sections) > 1:
        found.notes.append("of several alternatives for its hardware the first is taken")
    found.hardware = read_hardware(sections[0], _configuration(root, found))
    found.notes += found.hardware.notes
    _read_settings(sections[0], found)
    _read_disks(root, found)
    own = next((child for child in machine.children if child.space == OWN), None)
    if own is not None:
        _read_own(own, found)
    return found


def plain_reference(href: str, names: Collection[str]) -> str:
    """The name of the file that is meant. As of the specification it is a URI, but not all that
    write it take that to heart.

    Raises:
        HostileImageError: it is not the name of a file in the package.
    """
    if ":" in href or href.startswith("/"):
        raise refused(f"it refers to {href[:80]!r}, which is not in the package")
    name = plain_name(href)
    meant = plain_name(unquote(name)) if "%" in name else name
    return meant if meant in names and name not in names else name


def _files(root: Element, names: Collection[str]) -> dict[str, OvfFile]:
    """The files by their ids."""
    found: dict[str, OvfFile] = {}
    section = root.first("References")
    for item in section.all("File") if section is not None else ():
        id, href = item.attributes.get("id", ""), item.attributes.get("href", "")
        name = plain_reference(href, names)
        if item.attributes.get("chunkSize"):
            raise refused(f"{href[:80]!r} is cut into chunks, which is not known here")
        if not id or id in found:
            raise refused("its list of files is malformed")
        stated = item.attributes.get("size")
        found[id] = OvfFile(
            name=name,
            size=number(stated, "size of a file") if stated else None,
            compression=item.attributes.get("compression", "").lower(),
        )
    return found


def _machine(root: Element, wanted: str | None, found: Descriptor) -> Element:
    machines = list(root.all("VirtualSystem"))
    pending = list(root.all("VirtualSystemCollection"))
    while pending:
        collection = pending.pop()
        _check_sections(collection, found)
        machines += collection.all("VirtualSystem")
        pending += collection.all("VirtualSystemCollection")
    if not machines:
        raise refused("its descriptor has no VM")
    ids = [machine.attributes.get("id", "") for machine in machines]
    if wanted is None and len(machines) == 1:
        return machines[0]
    for machine, id in zip(machines, ids, strict=True):
        if wanted is not None and wanted in (id, machine.value("Name")):
            return machine
    names = ", ".join(id[:60] for id in ids[:10])
    raise InvalidError(
        f"the package has {len(machines)} VMs: {names}"
        if wanted is None
        else f"the package has no VM {wanted[:60]!r}, but {names}",
        action="import them one by one, each with --system ID",
    )


def _check_sections(parent: Element, found: Descriptor) -> None:
    for child in parent.children:
        if child.name in _KNOWN or child.space == OWN:
            continue
        if child.name in _TOLD:
            if _TOLD[child.name] and _TOLD[child.name] not in found.notes:
                found.notes.append(_TOLD[child.name])
            continue
        required = child.attributes.get("required", "true").lower() not in ("false", "0")
        if required:
            raise refused(
                f"it has a section {child.name[:60]} that must not be left out, and that is not "
                "known here"
            )
        found.notes.append(f"section {child.name[:60]} is left out")
        if child.name == "Machine" and "virtualbox" in child.space:
            _read_virtualbox(child, found)


def _read_virtualbox(machine: Element, found: Descriptor) -> None:
    """VirtualBox has no other place to say what firmware a VM has."""
    pending = [machine]
    while pending:
        element = pending.pop()
        if element.name == "Firmware" and "EFI" in element.attributes.get("type", "").upper():
            found.firmware = Firmware.UEFI
        pending += element.children


def _configuration(root: Element, found: Descriptor) -> str | None:
    section = root.first("DeploymentOptionSection")
    options = list(section.all("Configuration")) if section is not None else []
    if not options:
        return None
    chosen = next((o for o in options if o.attributes.get("default") in ("true", "1")), options[0])
    id = chosen.attributes.get("id", "")
    if len(options) > 1:
        found.notes.append(f"of its {len(options)} configurations, {id[:40]!r} is taken")
    return id


def _read_texts(machine: Element, found: Descriptor) -> None:
    system = machine.first("OperatingSystemSection")
    if system is not None:
        found.system = (system.value("Description") or system.attributes.get("osType", ""))[:80]
    product = machine.first("ProductSection")
    if product is not None:
        texts = [product.value(part) for part in ("Product", "Version", "Vendor")]
        found.product = " ".join(text for text in texts if text)[:120]
        if product.first("Property") is not None:
            found.notes.append("properties that its guest could be told at its start are left out")


def _read_settings(section: Element, found: Descriptor) -> None:
    """VMware's own settings: only what they say of the firmware is taken."""
    dropped: list[str] = []
    for item in section.all("Config"):
        key, value = item.attributes.get("key", ""), item.attributes.get("value", "").lower()
        if key == "firmware":
            found.firmware = Firmware.UEFI if value == "efi" else found.firmware
        elif key == "bootOptions.efiSecureBootEnabled":
            found.secure_boot = value == "true"
        else:
            dropped.append(key[:60])
    for item in section.all("ExtraConfig"):
        if item.attributes.get("key") == "nvram":
            found.notes.append("VMware's firmware settings are left out: they begin anew")
        else:
            dropped.append(item.attributes.get("key", "")[:60])
    if dropped:
        more = f" and {len(dropped) - 5} more" if len(dropped) > 5 else ""
        found.notes.append(f"settings left out: {', '.join(dropped[:5])}{more}")
    for child in section.children:
        if child.name not in _OF_HARDWARE and not child.name.endswith("Item"):
            found.notes.append(f"{child.name[:60]} of its hardware is left out")
    found.secure_boot = found.secure_boot and found.firmware is Firmware.UEFI


def _read_disks(root: Element, found: Descriptor) -> None:
    disks: dict[str, Element] = {}
    for section in root.all("DiskSection"):
        for item in section.all("Disk"):
            id = item.attributes.get("diskId", "")
            if not id or id in disks:
                raise refused("its list of disks is malformed")
            if item.attributes.get("parentRef"):
                raise refused("a disk of it lies on another one")
            disks[id] = item
    if len(disks) > _MOST_DISKS or len(found.hardware.disks) > _MOST_DISKS:
        raise refused(f"it has more than {_MOST_DISKS} disks")
    used: set[str] = set()
    for drive in found.hardware.disks:
        kind, _, id = drive.source.partition("/")
        if drive.source in used:
            raise refused("a disk of it is in two drives")
        used.add(drive.source)
        if kind == "file":
            found.disks.append(OvfDisk(0, _file(found, id), drive.bus))
            continue
        if id not in disks:
            raise refused(f"a drive holds disk {id[:60]!r}, which there is not")
        attributes = disks[id].attributes
        stated = number(attributes.get("capacity", ""), "size of a disk")
        size = stated * units(attributes.get("capacityAllocationUnits", "byte"))
        ref = attributes.get("fileRef")
        found.disks.append(OvfDisk(size, _file(found, ref) if ref else None, drive.bus))
    for id in disks:
        if f"disk/{id}" not in used:
            found.notes.append(f"disk {id[:40]!r} is in no drive, and left out")


def _file(found: Descriptor, id: str) -> OvfFile:
    if id not in found.files:
        raise refused(f"it refers to file {id[:60]!r}, which there is not")
    return found.files[id]


def _read_own(own: Element, found: Descriptor) -> None:
    """What we wrote ourselves, or somebody in our name: nothing in it is believed unseen."""
    try:
        found.firmware = Firmware(own.attributes.get("firmware", found.firmware))
        found.arch = own.attributes.get("arch", "x86_64")[:20]
        buses = {
            f"disk/{disk.attributes.get('disk', '')}": DiskBus(disk.attributes.get("bus", ""))
            for disk in own.all("Disk")
        }
        cdroms = [DiskBus(drive.attributes.get("bus", "")) for drive in own.all("Cdrom")]
        ports = [
            AppliancePort(
                network=port.attributes.get("network", "")[:80],
                model=NicModel(port.attributes.get("model", "")),
            )
            for port in own.all("Port")
        ]
    except ValueError:
        found.notes.append("what it says of Undercroft's own settings makes no sense")
        return
    found.image = own.attributes.get("image") or None
    drives = {
        drive.source: disk for drive, disk in zip(found.hardware.disks, found.disks, strict=True)
    }
    if buses.keys() == drives.keys():  # then their order counts, too: the first is booted from
        found.disks = [
            OvfDisk(drives[source].size, drives[source].file, bus) for source, bus in buses.items()
        ]
    if len(cdroms) == len(found.hardware.cdroms) and set(cdroms) <= {DiskBus.SATA, DiskBus.SCSI}:
        found.hardware.cdroms = cdroms
    if len(ports) == len(found.hardware.ports):
        found.hardware.ports = ports
        # What stood for them elsewhere does not matter here.
        found.notes = [note for note in found.notes if not note.startswith(ADAPTER)]
    nvram = own.attributes.get("nvram")
    if nvram:
        found.nvram = _file(found, nvram).name
