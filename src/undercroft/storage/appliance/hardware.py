"""The virtual hardware that a descriptor asks for, as ours.

Resource types are those of DSP1033 (CIM_ResourceAllocationSettingData) and DSP0243, annex; what
VMware and VirtualBox put into their subtypes was taken from packages of theirs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from undercroft.model.appliance import AppliancePort
from undercroft.model.units import MiB
from undercroft.model.vm import DiskBus, NicModel
from undercroft.storage.appliance.tar import refused
from undercroft.storage.appliance.xml import Element

__all__ = ["ADAPTER", "DiskItem", "Hardware", "read_hardware", "units"]

ADAPTER = "network adapter"
"""How notes on those begin."""
_CPU, _MEMORY, _IDE, _SCSI, _NETWORK = "3", "4", "5", "6", "10"
_FLOPPY, _CD, _DVD, _DISK, _STORAGE = "14", "15", "16", "17", "20"
_DROPPED = {
    "1": "a device of a kind of its own",
    _FLOPPY: "a floppy drive",
    "21": "a serial port",
    "22": "a parallel port",
    "23": "a USB controller",
    "24": "a graphics adapter",
    "35": "a sound card",
}
_UNITS = re.compile(r"byte\s*\*\s*2\s*\^\s*(\d{1,2})|byte\s*\*\s*(\d{1,15})", re.IGNORECASE)
_NAMED = {
    "": 0, "byte": 0, "bytes": 0, "kilobytes": 10, "kb": 10, "megabytes": 20, "mb": 20,
    "gigabytes": 30, "gb": 30, "terabytes": 40,
}  # fmt: skip
_MOST_ITEMS = 500


@dataclass
class DiskItem:
    """A disk drive: what it holds (``disk/vmdisk1``, ``file/file1``), and where it is."""

    source: str
    bus: DiskBus
    place: tuple[int, int]


@dataclass
class Hardware:
    """What is asked for, and what of it is not had. Memory in bytes."""

    cpus: int = 1
    memory: int = 512 * MiB
    disks: list[DiskItem] = field(default_factory=list)
    cdroms: list[DiskBus] = field(default_factory=list)
    ports: list[AppliancePort] = field(default_factory=list)
    tpm: bool = False
    notes: list[str] = field(default_factory=list)


def units(text: str) -> int:
    """Bytes of one unit: ``byte * 2^20``, ``MegaBytes``.

    Raises:
        HostileImageError: it makes no sense.
    """
    text = text.strip()
    if text.lower() in _NAMED:
        return 1 << _NAMED[text.lower()]
    match = _UNITS.fullmatch(text)
    if match is None or (match[1] is not None and int(match[1]) > 60):
        raise refused(f"{text[:40]!r} is not a unit of size")
    return 1 << int(match[1]) if match[1] is not None else int(match[2])


def number(text: str, what: str) -> int:
    """A number that is not negative.

    Raises:
        HostileImageError: it is none.
    """
    text = text.strip()
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise refused(f"{text[:40]!r} is not a {what}")
    return int(text)


def read_hardware(section: Element, configuration: str | None) -> Hardware:
    """What a VirtualHardwareSection asks for in a ``configuration`` (None: the package has none).

    Raises:
        HostileImageError: it makes no sense, or needs what cannot be had.
    """
    items = [child for child in section.children if child.name.endswith("Item")]
    if len(items) > _MOST_ITEMS:
        raise refused("it has too many devices")
    items = [
        item for item in items
        if item.attributes.get("bound", "normal") == "normal"
        and configuration_fits(item, configuration)
    ]  # fmt: skip
    controllers = {
        item.value("InstanceID"): (index, _bus(item)) for index, item in enumerate(items)
    }
    found = Hardware()
    for item in items:
        _take(item, controllers, found)
    found.disks.sort(key=lambda disk: disk.place)
    return found


def configuration_fits(item: Element, configuration: str | None) -> bool:
    """Whether an item belongs to a configuration: those that name none belong to all."""
    wanted = item.attributes.get("configuration", "").split()
    return not wanted or configuration in wanted


def _take(
    item: Element, controllers: dict[str, tuple[int, DiskBus | None]], found: Hardware
) -> None:
    kind = item.value("ResourceType")
    subtype = item.value("ResourceSubType").lower()
    named = item.value("ElementName") or item.value("Caption")
    if kind == _CPU:
        found.cpus = number(item.value("VirtualQuantity"), "number of CPUs")
    elif kind == _MEMORY:
        quantity = number(item.value("VirtualQuantity"), "size of memory")
        found.memory = quantity * units(item.value("AllocationUnits") or "MegaBytes")
    elif kind == _DISK:
        parent = controllers.get(item.value("Parent"))
        bus = parent[1] if parent is not None and parent[1] is not None else DiskBus.SATA
        text = item.value("AddressOnParent") or item.value("Address") or "0"
        place = (parent[0] if parent else len(controllers), number(text, "place of a disk"))
        found.disks.append(DiskItem(_source(item.value("HostResource")), bus, place))
    elif kind in (_CD, _DVD):
        parent = controllers.get(item.value("Parent"))
        scsi = parent is not None and parent[1] is DiskBus.SCSI
        found.cdroms.append(DiskBus.SCSI if scsi else DiskBus.SATA)
        if item.value("HostResource"):
            found.notes.append(f"the disc in {named[:40] or 'its CD drive'} is not taken")
    elif kind == _NETWORK:
        model = NicModel.VIRTIO if "virtio" in subtype else NicModel.E1000E
        if model is NicModel.E1000E and subtype not in ("e1000", "e1000e", ""):
            found.notes.append(f"{ADAPTER} {subtype[:20]!r} becomes e1000e")
        found.ports.append(AppliancePort(network=item.value("Connection")[:80], model=model))
    elif "vtpm" in subtype or "tpm" in subtype.split("."):
        found.tpm = True
        found.notes.append("its TPM is new and empty: what was sealed to the old one stays sealed")
    elif kind in (_IDE, _SCSI, _STORAGE):
        return
    elif kind in _DROPPED:
        found.notes.append(f"{_DROPPED[kind]} is left out ({named[:40] or subtype[:40]})")
    elif item.attributes.get("required", "true").lower() in ("false", "0"):
        found.notes.append(f"a device of type {kind[:10]} is left out ({named[:40]})")
    else:
        raise refused(
            f"it needs a device of type {kind[:10]!r} ({named[:40]}), which does not exist here"
        )


def _bus(item: Element) -> DiskBus | None:
    """The bus that stands for a controller's. A guest that has drivers only for VMware's SCSI
    controllers still has one for AHCI."""
    kind, subtype = item.value("ResourceType"), item.value("ResourceSubType").lower()
    if kind not in (_IDE, _SCSI, _STORAGE):
        return None
    if "nvme" in subtype:
        return DiskBus.NVME
    if "virtio-blk" in subtype or subtype == "virtio":
        return DiskBus.VIRTIO
    return DiskBus.SCSI if "virtio" in subtype.replace("virtualscsi", "") else DiskBus.SATA


def _source(text: str) -> str:
    """``disk/ID`` or ``file/ID`` of ``ovf:/disk/ID`` (older packages have ``/disk/ID``)."""
    path = text.removeprefix("ovf:").strip("/")
    if not path.startswith(("disk/", "file/")):
        raise refused(f"a disk drive has {text[:60]!r}, which is not in the package")
    return path
