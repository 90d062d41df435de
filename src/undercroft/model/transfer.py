"""What callers send and get where VMs and disks leave or come in as files."""

from __future__ import annotations

from undercroft.model.appliance import Appliance
from undercroft.model.base import Model, Spec
from undercroft.model.export import ExportFormat, VmdkKind
from undercroft.model.image import DiskFormat
from undercroft.model.vm import DiskBus, Firmware, NicModel


class ExportCreate(Spec, frozen=True, kw_only=True):
    """What to export: a ``vm``, or one of its ``snapshot``s, or a ``template`` (names or ids).

    ``disk``: which one, for formats of one disk (0 is the first); ``file``: what the file is to be
    called, without its suffix (None: as the VM); ``quiesce``: have the guest's agent bring its file
    systems in order first; ``checksums``: of the files, which is not worth its time to those who
    take them from where they lie. (A package has those of its disks in any case.)
    """

    vm: str | None = None
    snapshot: str | None = None
    template: str | None = None
    format: ExportFormat = ExportFormat.OVA
    vmdk: VmdkKind = VmdkKind.STREAM
    disk: int = 0
    file: str | None = None
    quiesce: bool = False
    checksums: bool = True


class UploadStatus(Model, frozen=True, kw_only=True):
    """How many bytes of what is being sent are there."""

    key: str
    size: int


class ImportSource(Spec, frozen=True, kw_only=True):
    """Where a VM or a disk comes from: the key of an ``upload``, or the ``path`` of a file on the
    daemon's host. ``file`` is how it was called where it came from; ``format``: that of a lone disk
    that does not tell it (raw); ``system``: which VM, if there are several in it; ``stamp``: what
    the file at ``path`` must still be, ``DEVICE:INODE:SIZE:MTIME`` (the last in nanoseconds)."""

    upload: str | None = None
    path: str | None = None
    stamp: str | None = None
    file: str = "disk"
    format: DiskFormat | None = None
    system: str | None = None


class ImportCreate(ImportSource, frozen=True, kw_only=True):
    """A VM to make of it. What is None comes from it, or else from the defaults.

    ``sha256`` (hex) is what the file must have. ``image``: name of the image whose kernel it boots
    (firmware ``kernel``). ``networks``: for each network of the package (``*``: all others) what
    takes its place: ``user``, ``restricted``, ``none``. ``bus`` and ``nic`` are for all disks and
    adapters; ``datastore`` (name or id) is where its disks are kept.
    """

    name: str | None = None
    datastore: str | None = None
    sha256: str | None = None
    cpus: int | None = None
    memory: int | None = None
    firmware: Firmware | None = None
    secure_boot: bool | None = None
    tpm: bool | None = None
    image: str | None = None
    bus: DiskBus | None = None
    nic: NicModel | None = None
    networks: dict[str, str] = {}
    labels: dict[str, str] = {}
    start: bool = False


__all__ = ["Appliance", "ExportCreate", "ImportCreate", "ImportSource", "UploadStatus"]
