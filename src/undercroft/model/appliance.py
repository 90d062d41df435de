"""What comes in as a file and becomes a VM: how it was found, before anything is made of it."""

from __future__ import annotations

from undercroft.model.base import Model
from undercroft.model.image import DiskFormat
from undercroft.model.vm import DiskBus, Firmware, NicModel


class ApplianceDisk(Model, frozen=True, kw_only=True):
    """A disk: the ``file`` that it is in (None: it is empty), its format, its size in bytes as a
    guest sees it, and the bus that its guest expects it on."""

    file: str | None
    size: int
    format: DiskFormat | None = None
    bus: DiskBus = DiskBus.SATA


class AppliancePort(Model, frozen=True, kw_only=True):
    """A network adapter: the name of the network where it came from, and what its guest can
    drive."""

    network: str
    model: NicModel = NicModel.E1000E


class Appliance(Model, frozen=True, kw_only=True):
    """A VM in a file. Memory in bytes; ``cdroms``: the bus of each of its CD-ROM drives.
    ``manifest``: the checksums that come with it (``sha256``), None without any; ``signed``: a
    certificate comes with it, which is not checked; ``notes`` are what is not taken over, and what
    a user should know."""

    name: str
    system: str = ""  # what it says of its operating system
    product: str = ""
    cpus: int = 1
    memory: int = 1 << 30
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    disks: tuple[ApplianceDisk, ...] = ()
    cdroms: tuple[DiskBus, ...] = ()
    ports: tuple[AppliancePort, ...] = ()
    manifest: str | None = None
    signed: bool = False
    notes: tuple[str, ...] = ()
