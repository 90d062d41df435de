"""What a VM is made of, with everything resolved: the input of the hypervisor.

A plan names files, sizes and devices; nothing in it has to be looked up any more. The same plan
always gives the same command line, and devices keep their bus addresses whatever else is added,
so that a suspended guest finds its devices where it left them.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from undercroft.model.base import Model
from undercroft.model.vm import (
    DiskBus,
    Display,
    Firmware,
    Machine,
    NicModel,
    PortMode,
    Protocol,
)
from undercroft.model.volume import IOLimits

__all__ = [
    "DiskFormat",
    "DiskLayer",
    "LogLimits",
    "MachinePlan",
    "PlanCdrom",
    "PlanDisk",
    "PlanForward",
    "PlanPort",
    "decode_plan",
    "encode_plan",
    "unit_of",
]


class DiskFormat(StrEnum):
    """Formats that QEMU is told explicitly; it never guesses."""

    RAW = "raw"
    QCOW2 = "qcow2"


class DiskLayer(Model, frozen=True, kw_only=True):
    """A file beneath a disk, opened for reading only. ``path`` is absolute; ``node`` what QEMU
    calls it (empty: after its place in the chain). ``key``: the path of the key that it is
    encrypted with. ``thin``: what the guest discards is the host's again."""

    path: str
    format: DiskFormat
    node: str = ""
    key: str | None = None
    thin: bool = True


class PlanDisk(Model, frozen=True, kw_only=True):
    """A disk.

    ``backing`` is the chain beneath ``path``, nearest first. It is stated here and given to QEMU
    as a graph: what the file's header says about a backing file is never followed. ``node`` is what
    QEMU calls the file at the top (empty: ``diskN``).
    ``boot_index``: firmware tries the lowest first; None: not at all. ``serial`` at most 20 bytes.
    ``key`` and ``thin`` are as of `DiskLayer`. ``unit`` is its place (-1: its position among the
    disks, see `unit_of`); ``limits`` what it may do per second.
    """

    path: str
    format: DiskFormat
    node: str = ""
    backing: tuple[DiskLayer, ...] = ()
    key: str | None = None
    thin: bool = True
    bus: DiskBus = DiskBus.VIRTIO
    read_only: bool = False
    serial: str = ""
    boot_index: int | None = None
    unit: int = -1
    limits: IOLimits = IOLimits()


class PlanCdrom(Model, frozen=True, kw_only=True):
    """A CD-ROM drive, on SATA or SCSI. ``path`` is the file that is in it as a raw, read-only
    medium (None: it is empty), ``node`` what QEMU calls that (empty: ``cdN``, after ``unit``)."""

    unit: int
    bus: DiskBus = DiskBus.SATA
    path: str | None = None
    node: str = ""
    boot_index: int | None = None


def unit_of(disk: PlanDisk, index: int) -> int:
    """The place of the disk at a position among a plan's disks."""
    return index if disk.unit < 0 else disk.unit


class PlanForward(Model, frozen=True, kw_only=True):
    """A listening port of the host that leads into the guest."""

    guest_port: int
    host_port: int
    host_address: str = "127.0.0.1"
    protocol: Protocol = Protocol.TCP


class PlanPort(Model, frozen=True, kw_only=True):
    """A network adapter. ``hostname`` is what DHCP tells the guest about itself. ``apart``: the
    network is there, but the adapter is not plugged into it (it is needed to load what was saved of
    it)."""

    mac: str
    mode: PortMode = PortMode.USER
    model: NicModel = NicModel.VIRTIO
    forwards: tuple[PlanForward, ...] = ()
    hostname: str | None = None
    boot_index: int | None = None
    apart: bool = False


class LogLimits(Model, frozen=True, kw_only=True):
    """Bounds of what a guest can put on the host's disk and make the daemon do.

    ``console`` and ``qemu`` are bytes on disk (both segments together); ``rate`` is how many bytes
    of console output are taken from the guest per second, ``scrollback`` how many are kept in
    memory for who attaches.
    """

    console: int = 1 << 20
    qemu: int = 256 << 10
    rate: int = 4 << 20
    scrollback: int = 64 << 10


class MachinePlan(Model, frozen=True, kw_only=True):
    """A VM, resolved. Sizes in bytes.

    ``accelerator`` is ``kvm`` or ``tcg``. ``machine_version`` pins the board (``10.0``), None
    takes the newest that QEMU has. ``directory`` (DATA/vms/ID) keeps what outlives a run,
    ``run_directory`` (DATA/run/vms/ID) the sockets. ``uid``/``gid``: whom QEMU runs as; None: as
    the caller. ``incoming`` is a state file written by `QemuMachine.suspend`.

    ``helper``: it has a port for the helper that its clones are changed by
    (`undercroft.hypervisor.helper`).
    ``hot_ports`` is the number of places for disks that come and go while it runs: all disks but
    unit 0 are in such places then; ``scsi``: there is a SCSI controller, whether used or not.

    ``memory_file`` is a file that the guest's memory is mapped from, as large as that: privately,
    so that what the guest changes is its own, or ``memory_shared``, so that the file has it.
    A state that goes with such a file has no memory in it.
    """

    id: str
    name: str
    uuid: str
    directory: str
    run_directory: str
    arch: str = "x86_64"
    machine: Machine = Machine.Q35
    machine_version: str | None = None
    firmware: Firmware = Firmware.BIOS
    secure_boot: bool = False
    tpm: bool = False
    accelerator: str = "tcg"
    cpus: int = 1
    cpu_model: str | None = None
    memory: int = 256 << 20
    kernel: str | None = None
    initrd: str | None = None
    kernel_arguments: str = ""
    disks: tuple[PlanDisk, ...] = ()
    cdroms: tuple[PlanCdrom, ...] = ()
    seed: str | None = None
    ports: tuple[PlanPort, ...] = ()
    display: Display = Display.NONE
    agent: bool = True
    helper: bool = False
    rng: bool = True
    balloon: bool = True
    pvpanic: bool = True
    vmgenid: str | None = None
    uid: int | None = None
    gid: int | None = None
    logs: LogLimits = LogLimits()
    incoming: str | None = None
    hot_ports: int = 0
    scsi: bool = False
    memory_file: str | None = None
    memory_shared: bool = False
    generation: int = 1

    @property
    def buses(self) -> tuple[DiskBus, ...]:
        """The bus of each disk and CD-ROM drive."""
        return (*(disk.bus for disk in self.disks), *(drive.bus for drive in self.cdroms))


def encode_plan(plan: MachinePlan) -> bytes:
    """The plan as JSON: kept beside a running or suspended VM."""
    return msgspec.json.encode(plan)


def decode_plan(data: bytes) -> MachinePlan:
    """The plan from JSON.

    Raises:
        msgspec.MsgspecError: it is not one.
    """
    return msgspec.json.decode(data, type=MachinePlan)
