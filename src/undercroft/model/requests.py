"""What callers send and get besides the objects themselves."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from undercroft.model.base import Model, Ref, Spec
from undercroft.model.image import DiskFormat, ImageSourceKind
from undercroft.model.layer import LayerFormat
from undercroft.model.task import Task
from undercroft.model.vm import (
    Accelerator,
    BootFirst,
    DiskBus,
    Display,
    Firmware,
    Forward,
    Guest,
    Machine,
    Port,
    RestartPolicy,
)


class NewDisk(Spec, frozen=True, kw_only=True):
    """An empty disk of ``size`` bytes that goes with its VM."""

    size: int
    bus: DiskBus = DiskBus.VIRTIO


class VolumeUse(Spec, frozen=True, kw_only=True):
    """A volume (a name or id) that a VM is to have from the beginning, and that it does not take
    with it when it goes."""

    volume: str
    bus: DiskBus = DiskBus.VIRTIO
    read_only: bool = False


class NewCdrom(Spec, frozen=True, kw_only=True):
    """A CD-ROM drive (``bus`` None: SATA where the board has it, else SCSI) with what is in it: the
    path of a file on the daemon's host, or nothing."""

    bus: DiskBus | None = None
    path: str | None = None


class InsertRequest(Spec, frozen=True, kw_only=True):
    """What is to be in a CD-ROM drive, in place of what is in it now: the path of a file on the
    daemon's host. ``force``: also if the guest has locked the drive."""

    path: str
    force: bool = False


class EjectRequest(Spec, frozen=True, kw_only=True):
    """How to empty a CD-ROM drive: with ``force`` also if the guest has locked it, or is suspended
    and cannot be asked."""

    force: bool = False


class VMCreate(Spec, frozen=True, kw_only=True):
    """A new VM. What is None comes from the image, or else from the model's defaults.

    ``image`` is a name or id; without one the VM has an empty disk of ``disk`` bytes (or none).
    ``ports`` None: one port in user mode, with SSH forwarded where the image serves it;
    an empty tuple: no network. ``start``: switch it on once it is there; ``cold``: it boots even
    where it could go on from what an earlier boot has left.
    """

    name: str | None = None  # None: chosen
    image: str | None = None
    cpus: int | None = None
    memory: int | None = None
    disk: int | None = None
    disk_bus: DiskBus = DiskBus.VIRTIO
    disks: tuple[NewDisk, ...] = ()  # besides the first
    volumes: tuple[VolumeUse, ...] = ()  # after those
    cdroms: tuple[NewCdrom, ...] = ()
    boot: BootFirst = BootFirst.DISK
    datastore: str | None = None  # name or id of the one that its disks are in
    encrypt: bool = False  # those that are made for it
    arch: str | None = None
    machine: Machine | None = None
    firmware: Firmware | None = None
    secure_boot: bool = False
    tpm: bool = False
    accelerator: Accelerator = Accelerator.AUTO
    cpu_model: str | None = None
    display: Display | None = None
    kernel_arguments: str = ""
    ports: tuple[Port, ...] | None = None
    forwards: tuple[Forward, ...] = ()  # added to the first port
    guest: Guest = Guest()
    restart: RestartPolicy = RestartPolicy.ON_FAILURE
    stop_timeout: float = 60.0
    labels: dict[str, str] = {}
    project: str = "default"
    start: bool = False
    cold: bool = False


class VMChange(Spec, frozen=True, kw_only=True):
    """Changes to a VM; None leaves as it is. Shape takes effect at the next start."""

    name: str | None = None
    cpus: int | None = None
    memory: int | None = None
    accelerator: Accelerator | None = None
    cpu_model: str | None = None
    display: Display | None = None
    boot: BootFirst | None = None
    kernel_arguments: str | None = None
    restart: RestartPolicy | None = None
    stop_timeout: float | None = None
    labels: dict[str, str] | None = None
    forwards: tuple[Forward, ...] | None = None


class StopRequest(Spec, frozen=True, kw_only=True):
    """How to stop (or restart): at once with ``force``; else wait ``timeout`` seconds for the guest
    (None: the VM's own), then switch it off."""

    force: bool = False
    timeout: float | None = None


class SnapshotCreate(Spec, frozen=True, kw_only=True):
    """A new snapshot. ``memory``: with what a running guest has in memory; ``quiesce``: have the
    guest's agent bring its file systems in order first."""

    name: str | None = None  # None: chosen
    description: str = ""
    memory: bool = False
    quiesce: bool = False


class RevertRequest(Spec, frozen=True, kw_only=True):
    """How to go back to a snapshot: with ``force`` also if the VM runs; ``start`` it afterwards."""

    force: bool = False
    start: bool = False


class CloneMode(StrEnum):
    """How a clone comes by what its source has."""

    LINKED = "linked"  # its disks lie on those of the source and have what differs
    FULL = "full"  # its disks are copies
    INSTANT = "instant"  # linked, and it goes on from what the source has in memory


class CloneRequest(Spec, frozen=True, kw_only=True):
    """Clones to make: one of each of ``names``, or ``count`` with a name that is chosen.

    ``mode`` None: instant from a template with memory, else linked. ``start``: switch them on
    (instant ones run at once). ``quiesce``: have the source's guest agent bring its file systems in
    order first. ``cpus`` and ``memory`` (bytes): other than the source's, not for instant ones.
    ``datastore`` (name or id): where their disks are to be, None: beside those of the source.
    ``encrypted``: whether their disks are, None: as those of the source; what is linked to
    encrypted ones always is.
    """

    names: tuple[str, ...] = ()
    count: int = 1
    mode: CloneMode | None = None
    start: bool = False
    quiesce: bool = False
    cpus: int | None = None
    memory: int | None = None
    hostname: str | None = None
    datastore: str | None = None
    encrypted: bool | None = None
    labels: dict[str, str] = {}


class TaskList(Model, frozen=True, kw_only=True):
    """Tasks that one request led to, in the order of what was asked for."""

    tasks: tuple[Task, ...]


class TemplateCreate(Spec, frozen=True, kw_only=True):
    """A new template from a VM. ``memory``: with what its guest has in memory; ``quiesce``: have
    its agent bring the file systems in order first."""

    name: str
    source: str
    description: str = ""
    memory: bool = False
    quiesce: bool = False


class VolumeCreate(Spec, frozen=True, kw_only=True):
    """A new volume that belongs to no VM yet. ``size`` in bytes (None: that of the source);
    ``source``: name or id of an image that it begins as; ``preallocate``: take all its space on the
    host now, so that it cannot run out of it later; ``encrypt``: so that nobody can read it who has
    only the disk that it is on; ``datastore``: name or id."""

    name: str
    size: int | None = None
    source: str | None = None
    preallocate: bool = False
    encrypt: bool = False
    format: LayerFormat = LayerFormat.QCOW2
    datastore: str | None = None
    labels: dict[str, str] = {}


class VolumeClone(Spec, frozen=True, kw_only=True):
    """A new volume that begins as another is: over what they share, or with ``full`` with a copy of
    it. ``size`` in bytes: larger than the source (None: as large); ``datastore``: name or id (None:
    that of the source). ``encrypted`` None: if the source is. A linked one of what is encrypted is
    so, too."""

    name: str
    full: bool = False
    encrypted: bool | None = None
    size: int | None = None
    datastore: str | None = None
    labels: dict[str, str] = {}


class DatastoreCreate(Spec, frozen=True, kw_only=True):
    """A new datastore: a directory of the daemon's host by its absolute path. ``default``:
    what is put nowhere in particular is put there; ``warning`` and ``critical``: of which part of
    its capacity in use somebody is told."""

    name: str
    path: str
    default: bool = False
    warning: float = 0.80
    critical: float = 0.95
    labels: dict[str, str] = {}


class DatastoreChange(Spec, frozen=True, kw_only=True):
    """Changes to a datastore; None leaves as it is. ``default`` can only be given to one: the one
    that had it is not the default any more."""

    name: str | None = None
    default: bool | None = None
    warning: float | None = None
    critical: float | None = None


class Keeper(Ref, frozen=True, kw_only=True):
    """What keeps a layer; ``of`` is the name of the VM that a snapshot is of."""

    of: str | None = None


class LayerNode(Model, frozen=True, kw_only=True):
    """A layer, or an image at the bottom (``kind`` is ``layer`` or ``image``), and what needs it:
    the volume that writes to it, the snapshots and templates that keep it. ``parent`` is the node
    that it lies on; ``size`` what a guest sees and ``allocated`` what the host gives, in bytes."""

    id: str
    kind: str
    name: str = ""
    parent: str | None = None
    size: int = 0
    allocated: int = 0
    volume: Ref | None = None
    kept: tuple[Keeper, ...] = ()


class LayerTree(Model, frozen=True, kw_only=True):
    """All layers, and the images that some lie on; what lies beneath comes first."""

    nodes: tuple[LayerNode, ...]


class VolumeAttach(Spec, frozen=True, kw_only=True):
    """How a volume is attached to a VM (a name or id)."""

    vm: str
    bus: DiskBus = DiskBus.VIRTIO
    read_only: bool = False


class VolumeResize(Spec, frozen=True, kw_only=True):
    """How large a volume is to become: ``size`` bytes, or larger ``by`` so many."""

    size: int | None = None
    by: int | None = None


class VolumeChange(Spec, frozen=True, kw_only=True):
    """New limits of a volume, see `undercroft.model.volume.IOLimits`; None leaves as it is, 0 takes
    the limit away."""

    iops: int | None = None
    read_iops: int | None = None
    write_iops: int | None = None
    bandwidth: int | None = None
    read_bandwidth: int | None = None
    write_bandwidth: int | None = None
    burst: int | None = None


class ImageCreate(Spec, frozen=True, kw_only=True):
    """A new image. ``name`` None: taken from the source. ``value``: what to build, the path of a
    file on the daemon's host, an address, or a name in the catalogue."""

    source: ImageSourceKind
    value: str
    name: str | None = None
    sha256: str | None = None
    format: DiskFormat | None = None
    firmware: str | None = None
    user: str | None = None
    replace: bool = False  # take the name over from an older image


class ExecRequest(Spec, frozen=True, kw_only=True):
    """A program to run in a guest. ``input`` goes to its standard input; ``timeout`` in seconds."""

    argv: tuple[str, ...]
    input: bytes | None = None
    env: dict[str, str] = {}
    timeout: float = 60.0


class ExecResult(Model, frozen=True, kw_only=True):
    """What became of it: ``exit_code``, or ``signal`` if one ended it.

    ``truncated``: there was more output than the guest agent keeps.
    """

    exit_code: int | None
    signal: int | None = None
    stdout: bytes = b""
    stderr: bytes = b""
    truncated: bool = False


class CheckFinding(Model, frozen=True, kw_only=True):
    """Something that does not belong, or is missing; ``repaired`` if it was put right."""

    code: str
    message: str
    object: str | None = None
    path: str | None = None
    repaired: bool = False


class CheckReport(Model, frozen=True, kw_only=True):
    """The outcome of ``croft host check``."""

    findings: tuple[CheckFinding, ...] = ()
    checked: dict[str, int] = {}


class VMSample(Model, frozen=True, kw_only=True):
    """A measurement of one running VM: counters since it was started.

    Times in seconds, sizes in bytes. ``memory`` is what its QEMU holds in the host's memory (PSS
    where it can be read). What went over the network is counted by the guest and asked for twice a
    minute; 0 without an agent.
    """

    vm: str
    name: str
    cpu_seconds: float = 0.0
    memory: int = 0
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    disk_reads: int = 0
    disk_writes: int = 0
    net_receive_bytes: int = 0
    net_transmit_bytes: int = 0


class VersionInfo(Model, frozen=True, kw_only=True):
    """What answers at the root of the API."""

    product: str
    version: str
    api: str
    host: str
    data: str
    pid: int


class Page(Model, frozen=True, kw_only=True):
    """A page of a listing; ``next`` is the cursor of the following one."""

    items: list[Any]
    revision: int
    next: str | None = None
