"""Virtual machines."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec


class Power(StrEnum):
    """What a VM should be doing."""

    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    SUSPENDED = "suspended"


class VMState(StrEnum):
    """What a VM is doing."""

    CREATING = "creating"
    STOPPED = "stopped"
    STARTING = "starting"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    SUSPENDING = "suspending"
    SUSPENDED = "suspended"
    FAILED = "failed"
    REMOVING = "removing"

    @property
    def alive(self) -> bool:
        """Whether a QEMU process belongs to this state."""
        return self in _ALIVE


_ALIVE = frozenset(
    {VMState.STARTING, VMState.RUNNING, VMState.PAUSED, VMState.STOPPING, VMState.SUSPENDING}
)


class Machine(StrEnum):
    """The board that QEMU emulates."""

    Q35 = "q35"
    MICROVM = "microvm"
    VIRT = "virt"  # ARM and RISC-V


class Firmware(StrEnum):
    """What runs first in the guest."""

    BIOS = "bios"
    UEFI = "uefi"
    KERNEL = "kernel"  # direct boot of the image's kernel


class Accelerator(StrEnum):
    """How guest instructions are carried out; AUTO takes KVM where it truly works."""

    AUTO = "auto"
    KVM = "kvm"
    TCG = "tcg"


class Display(StrEnum):
    """The graphics adapter."""

    NONE = "none"
    STD = "std"
    VIRTIO = "virtio"


class DiskBus(StrEnum):
    """How a disk is attached."""

    VIRTIO = "virtio"
    SCSI = "scsi"
    SATA = "sata"
    NVME = "nvme"


class BootFirst(StrEnum):
    """What firmware tries first. What cannot be booted is passed over, so an empty disk leads to
    the disc in a CD-ROM drive either way."""

    DISK = "disk"
    CDROM = "cdrom"


class NicModel(StrEnum):
    """The network adapter."""

    VIRTIO = "virtio"
    E1000E = "e1000e"


class PortMode(StrEnum):
    """What a port is connected to.

    USER is a private user-mode NAT; RESTRICTED is the same without any way out (only forwarded
    ports reach in).
    """

    USER = "user"
    RESTRICTED = "restricted"


class RestartPolicy(StrEnum):
    """When a VM is started again by itself. A shutdown that a user asked for never counts."""

    NEVER = "never"
    ON_FAILURE = "on-failure"  # crashed, killed, guest panicked, host lost power
    ALWAYS = "always"  # also when the guest shut itself down


class Protocol(StrEnum):
    """Transport protocols that can be forwarded."""

    TCP = "tcp"
    UDP = "udp"


class Disk(Spec, frozen=True, kw_only=True):
    """A volume (by id) attached to a VM. The first disk is the one to boot from. ``unit`` is its
    place in the machine, which stays while others come and go (-1: its position, `disk_units`)."""

    volume: str
    bus: DiskBus = DiskBus.VIRTIO
    read_only: bool = False
    unit: int = -1


MAX_DISKS = 16


def disk_units(disks: Sequence[Disk]) -> tuple[int, ...]:
    """The place of each of a VM's disks in the machine."""
    return tuple(index if disk.unit < 0 else disk.unit for index, disk in enumerate(disks))


class Cdrom(Spec, frozen=True, kw_only=True):
    """A CD-ROM drive, on SATA or SCSI. ``medium`` is what is in it: the absolute path of a file of
    the host (None: it is empty). ``unit`` is its number, which it keeps."""

    bus: DiskBus = DiskBus.SATA
    medium: str | None = None
    unit: int = 0


MAX_CDROMS = 4


class Forward(Spec, frozen=True, kw_only=True):
    """A port of the host that leads to a port of the guest. ``host_port`` 0: chosen at creation."""

    guest_port: int
    host_port: int = 0
    host_address: str = "127.0.0.1"
    protocol: Protocol = Protocol.TCP


class Port(Spec, frozen=True, kw_only=True):
    """A network adapter and what it is plugged into. An empty ``mac`` is chosen at creation."""

    mac: str = ""
    mode: PortMode = PortMode.USER
    model: NicModel = NicModel.VIRTIO
    forwards: tuple[Forward, ...] = ()


class Guest(Spec, frozen=True, kw_only=True):
    """What the guest is told about itself through cloud-init (NoCloud).

    ``user_data`` is merged with what Undercroft writes; ``password_hash`` is in crypt(5) form.
    """

    hostname: str | None = None
    user: str | None = None
    ssh_keys: tuple[str, ...] = ()
    password_hash: str | None = None
    user_data: str | None = None


class VMSpec(Spec, frozen=True, kw_only=True):
    """What a VM should be. Memory in bytes, times in seconds; ``image`` and ``host`` are ids.
    ``passing``: it is nobody's, and goes again when it has served."""

    host: str
    power: Power = Power.STOPPED
    cpus: int = 1
    memory: int = 512 << 20
    arch: str = "x86_64"
    machine: Machine = Machine.Q35
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    accelerator: Accelerator = Accelerator.AUTO
    cpu_model: str | None = None  # None: everything the accelerator offers
    display: Display = Display.STD
    image: str | None = None
    kernel_arguments: str = ""  # added to the image's own at direct boot
    disks: tuple[Disk, ...] = ()
    cdroms: tuple[Cdrom, ...] = ()
    boot: BootFirst = BootFirst.DISK
    ports: tuple[Port, ...] = ()
    guest: Guest = Guest()
    restart: RestartPolicy = RestartPolicy.ON_FAILURE
    stop_timeout: float = 60.0
    passing: bool = False


class ExitReason(StrEnum):
    """Why a VM is not running any more."""

    STOPPED = "stopped"  # a user asked, the guest complied
    FORCED = "forced"  # a user asked, the guest was switched off
    GUEST_SHUTDOWN = "guest-shutdown"  # the guest switched itself off
    GUEST_PANIC = "guest-panic"
    CRASHED = "crashed"  # QEMU itself ended by a fault of its own
    KILLED = "killed"  # QEMU was ended by a signal from outside
    SUSPENDED = "suspended"
    LOST = "lost"  # gone while nobody watched (host restarted)
    START_FAILED = "start-failed"

    @property
    def failure(self) -> bool:
        """Whether restart policy ON_FAILURE applies."""
        return self in _FAILURES


_FAILURES = frozenset(
    {ExitReason.GUEST_PANIC, ExitReason.CRASHED, ExitReason.KILLED, ExitReason.LOST}
)


class Exit(Model, frozen=True, kw_only=True):
    """How the last run ended. ``code`` or ``signal`` are those of the QEMU process if known."""

    reason: ExitReason
    time: float
    code: int | None = None
    signal: int | None = None
    message: str = ""


class Instance(Model, frozen=True, kw_only=True):
    """A running QEMU, told apart from any later process with the same pid.

    ``start_ticks`` is field 22 of ``/proc/PID/stat`` (proc(5)); ``host_boot`` the host's boot id;
    ``generation`` that of the spec it was started with, of which the shape is repeated here.
    """

    pid: int
    start_ticks: int
    host_boot: str
    uid: int
    started: float
    accelerator: str
    qemu: str
    cpus: int
    memory: int
    generation: int


class Identity(StrEnum):
    """Whether a VM is an individual: what was cloned was somebody else before."""

    OWN = "own"
    PENDING = "pending"  # seen to when its guest agent answers for the first time
    PARTIAL = "partial"  # it shares some of that of its source, `VMStatus.shares`


class VMStatus(Model, frozen=True, kw_only=True):
    """What a VM is. ``agent`` tells whether the guest agent answers (None: not known);
    ``restarts`` counts automatic restarts since a user last started it; ``snapshot`` is the id of
    the snapshot that its present state comes from; ``returns`` how often it went back to what it
    was before, which its guest is told; ``shares``: what of its identity is still that of the VM
    that it was cloned from; ``held``: the template (an id) from which it is ready to go on."""

    state: VMState = VMState.CREATING
    uid: int | None = None  # what its QEMU runs as, for as long as the VM exists
    instance: Instance | None = None
    last_exit: Exit | None = None
    addresses: tuple[str, ...] = ()
    agent: bool | None = None
    restarts: int = 0
    snapshot: str | None = None
    returns: int = 0
    identity: Identity = Identity.OWN
    shares: tuple[str, ...] = ()
    held: str | None = None
    message: str | None = None


class VM(Record, frozen=True, kw_only=True):
    """A virtual machine. ``tasks`` are the ids of those that wait or run, in their order."""

    kind: ClassVar[str] = "vm"
    spec: VMSpec
    status: VMStatus = VMStatus()
    tasks: tuple[str, ...] = ()
