"""Which VM specs make sense. Every rule that needs nothing but the spec itself is here."""

from __future__ import annotations

import ipaddress
import re
from typing import Literal

from undercroft.model.errors import InvalidError, UnsupportedError
from undercroft.model.units import MiB, TiB, format_size
from undercroft.model.vm import (
    MAX_CDROMS,
    MAX_DISKS,
    VM,
    BootFirst,
    DiskBus,
    Display,
    Firmware,
    Guest,
    Machine,
    NicModel,
    Port,
    VMSpec,
    disk_units,
)

MIN_MEMORY = 16 * MiB
MAX_MEMORY = 16 * TiB
MAX_CPUS = {Machine.Q35: 255, Machine.MICROVM: 255, Machine.VIRT: 255}
MAX_USER_DATA = 1 * MiB
MAX_PATH = 4000
MAX_SATA = 5  # of the six ports of the board: the seed may need one
_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_CPU_MODEL = re.compile(r"[A-Za-z0-9_.+-]{1,63}(?:,[+-]?[A-Za-z0-9_.=+-]{1,63}){0,63}")
_ARCH = ("x86_64", "aarch64", "arm", "i386", "riscv64", "ppc64")
_SSH_KEY = re.compile(r"[a-z0-9@.-]{3,64} [A-Za-z0-9+/=]{16,16384}(?: [^\x00-\x1f\x7f]{0,256})?")


def check_vm_spec(spec: VMSpec) -> VMSpec:
    """Returns a spec that makes sense unchanged.

    Raises:
        InvalidError: a value is out of range, or values contradict one another.
        UnsupportedError: the combination makes sense but cannot be had.
    """
    if not 1 <= spec.cpus <= MAX_CPUS[spec.machine]:
        raise InvalidError(
            f"{spec.cpus} CPUs are not possible",
            action=f"choose 1 to {MAX_CPUS[spec.machine]}",
        )
    if not MIN_MEMORY <= spec.memory <= MAX_MEMORY or spec.memory % MiB:
        raise InvalidError(
            f"{spec.memory} bytes of memory are not possible",
            action=f"choose a multiple of 1M from {format_size(MIN_MEMORY)} to "
            f"{format_size(MAX_MEMORY)}",
        )
    if spec.arch not in _ARCH:
        raise InvalidError(f"architecture {spec.arch[:40]!r} is not known")
    if not 0 <= spec.stop_timeout <= 86400:
        raise InvalidError("the stop timeout must lie between 0 and 86400 seconds")
    if spec.cpu_model is not None and _CPU_MODEL.fullmatch(spec.cpu_model) is None:
        raise InvalidError(f"{spec.cpu_model[:40]!r} is not a CPU model")
    _check_text(spec.kernel_arguments, "kernel arguments", 2048)
    _check_machine(spec)
    _check_disks(spec)
    _check_cdroms(spec)
    check_ports(spec.ports)
    _check_guest(spec.guest)
    return spec


def check_ports(ports: tuple[Port, ...]) -> None:
    """Does nothing if the network adapters, and what is forwarded to them, make sense together.

    Raises:
        InvalidError: they do not.
    """
    if len(ports) > 8:
        raise InvalidError("a VM has at most 8 ports")
    for port in ports:
        _check_port(port)
    macs = [port.mac for port in ports if port.mac]
    if len(set(macs)) != len(macs):
        raise InvalidError("two network adapters of one VM cannot have the same MAC address")
    taken = [(f.protocol, f.host_port) for port in ports for f in port.forwards if f.host_port]
    if len(set(taken)) != len(taken):
        raise InvalidError("a port of the host is forwarded twice")


def _check_machine(spec: VMSpec) -> None:
    x86 = spec.arch in ("x86_64", "i386")
    if x86 == (spec.machine is Machine.VIRT):
        raise InvalidError(
            f"machine {spec.machine} does not exist for {spec.arch}",
            action="use q35 or microvm for x86_64, virt for the others",
        )
    if spec.machine is Machine.MICROVM:
        if spec.firmware is not Firmware.KERNEL:
            raise UnsupportedError(
                "a microvm boots a kernel directly, without firmware",
                action="use --machine q35, or an image with a kernel of its own",
            )
        if spec.display is not Display.NONE:
            raise UnsupportedError("a microvm has no display", action="use --display none")
        if any(port.model is not NicModel.VIRTIO for port in spec.ports):
            raise UnsupportedError("a microvm has only virtio network adapters")
    if spec.secure_boot and spec.firmware is not Firmware.UEFI:
        raise InvalidError("secure boot needs UEFI firmware", action="add --firmware uefi")
    if spec.secure_boot and spec.machine is not Machine.Q35:
        raise UnsupportedError("secure boot needs machine q35")
    if spec.tpm and spec.machine is Machine.MICROVM:
        raise UnsupportedError("a microvm has no TPM", action="use --machine q35")


_Saved = Literal["suspend", "snapshot", "template", "clone"]
# What to do where memory cannot be saved, by what it was to be saved for.
_OTHERWISE: dict[_Saved, str] = {
    "suspend": "shut it down: croft stop {name}",
    "snapshot": "take the snapshot without --memory",
    "template": "make the template without --memory",
    "clone": "croft clone {name} NAME --linked",
}


def check_can_be_saved(vm: VM, what: _Saved) -> None:
    """Does nothing if what a VM has in memory can be written to a file, for ``what`` was asked.

    Raises:
        UnsupportedError: it has a disk whose state cannot.
    """
    if any(disk.bus is DiskBus.NVME for disk in vm.spec.disks):
        raise UnsupportedError(
            f"{vm.label} has an NVMe disk, which QEMU cannot save together with its memory",
            object=vm.label,
            action=f"{_OTHERWISE[what].format(name=vm.meta.name)}, "
            "or give it disks with bus virtio or scsi",
        )


def check_moment(memory: bool, quiesce: bool) -> None:
    """Does nothing if what is to be kept of a VM can be kept of one moment.

    Raises:
        InvalidError: it cannot.
    """
    if memory and quiesce:
        raise InvalidError(
            "a guest is either kept with its memory, which has what its file systems have yet to "
            "write, or has them in order (quiesced); not both",
            action="leave out one of the two",
        )


def _check_disks(spec: VMSpec) -> None:
    if len(spec.disks) > MAX_DISKS:
        raise InvalidError(f"a VM has at most {MAX_DISKS} disks")
    units = disk_units(spec.disks)
    if len(set(units)) != len(units) or any(unit >= MAX_DISKS for unit in units):
        raise InvalidError("two disks cannot be in one place")
    buses = [disk.bus for disk in spec.disks]
    if spec.machine is Machine.MICROVM and {DiskBus.SATA, DiskBus.NVME} & set(buses):
        raise UnsupportedError(
            "a microvm has no SATA and no NVMe disks", action="use bus virtio or scsi"
        )
    if spec.machine is Machine.VIRT and DiskBus.SATA in buses:
        raise UnsupportedError("the virt board has no SATA", action="use bus virtio, scsi or nvme")
    if buses.count(DiskBus.SATA) > MAX_SATA:
        raise InvalidError(
            f"{buses.count(DiskBus.SATA)} SATA disks: at most {MAX_SATA} fit on the board",
            action="use bus virtio or scsi",
        )
    for disk in spec.disks:
        if disk.read_only and disk.bus is DiskBus.SATA:
            raise UnsupportedError(
                "there are no read-only SATA disks", action="use bus virtio, scsi or nvme"
            )


def check_medium_path(path: str) -> str:
    """Returns the path of a file that can be put into a CD-ROM drive unchanged.

    Raises:
        InvalidError: it is not absolute, or cannot be written down.
    """
    if not path.startswith("/") or not path.isprintable() or len(path) > MAX_PATH:
        raise InvalidError(f"{path[:80]!r} is not an absolute path", action="begin it with /")
    return path


def _check_cdroms(spec: VMSpec) -> None:
    if len(spec.cdroms) > MAX_CDROMS:
        raise InvalidError(f"a VM has at most {MAX_CDROMS} CD-ROM drives")
    units = [drive.unit for drive in spec.cdroms]
    if len(set(units)) != len(units) or not all(0 <= unit < MAX_CDROMS for unit in units):
        raise InvalidError("two CD-ROM drives cannot have one number")
    buses = [drive.bus for drive in spec.cdroms]
    if not set(buses) <= {DiskBus.SATA, DiskBus.SCSI}:
        raise UnsupportedError("CD-ROM drives are on SATA or SCSI", action="use bus sata or scsi")
    if DiskBus.SATA in buses and spec.machine is not Machine.Q35:
        raise UnsupportedError(
            f"the {spec.machine} board has no SATA", action="use a CD-ROM drive on bus scsi"
        )
    sata = buses.count(DiskBus.SATA) + sum(disk.bus is DiskBus.SATA for disk in spec.disks)
    if sata > MAX_SATA:
        raise InvalidError(
            f"{sata} SATA disks and drives: at most {MAX_SATA} fit on the board",
            action="use bus scsi for some",
        )
    for drive in spec.cdroms:
        if drive.medium is not None:
            check_medium_path(drive.medium)
    if spec.boot is BootFirst.CDROM and spec.firmware is Firmware.KERNEL:
        raise InvalidError(
            "this VM boots the kernel of its image, whatever is in its drives",
            action="use --firmware bios or uefi to boot from a disc",
        )


def _check_port(port: Port) -> None:
    if port.mac:
        if _MAC.fullmatch(port.mac) is None:
            raise InvalidError(
                f"{port.mac[:40]!r} is not a MAC address",
                action="write six pairs of lower-case hexadecimal digits: 52:54:00:12:34:56",
            )
        if int(port.mac[:2], 16) & 1:
            raise InvalidError(f"{port.mac} is a multicast address, no adapter can have it")
    if len(port.forwards) > 64:
        raise InvalidError("a port has at most 64 forwards")
    for forward in port.forwards:
        if not 1 <= forward.guest_port <= 65535 or not 0 <= forward.host_port <= 65535:
            raise InvalidError("a port number lies between 1 and 65535")
        try:
            ipaddress.IPv4Address(forward.host_address)
        except ValueError:
            raise InvalidError(f"{forward.host_address[:40]!r} is not an IPv4 address") from None


def check_user(name: str) -> str:
    """Returns a valid user name (useradd(8)) unchanged.

    Raises:
        InvalidError: not one.
    """
    if _USER.fullmatch(name) is None:
        raise InvalidError(f"{name[:40]!r} is not a user name")
    return name


def _check_guest(guest: Guest) -> None:
    if guest.user is not None:
        check_user(guest.user)
    if guest.hostname is not None:
        labels = guest.hostname.split(".")
        if len(guest.hostname) > 253 or not all(
            re.fullmatch(r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?", label)
            for label in labels
        ):
            raise InvalidError(f"{guest.hostname[:80]!r} is not a host name")
    for key in guest.ssh_keys:
        if _SSH_KEY.fullmatch(key.strip()) is None:
            raise InvalidError(
                f"{key[:40]!r} is not an SSH public key",
                action="give the content of a file such as ~/.ssh/id_ed25519.pub",
            )
    if (
        guest.password_hash is not None
        and re.fullmatch(r"\$[0-9a-z]{1,3}\$[!-~]{8,256}", guest.password_hash) is None
    ):
        raise InvalidError("the password hash is not in crypt(5) form", action="see mkpasswd(1)")
    if guest.user_data is not None:
        try:
            size = len(guest.user_data.encode())
        except UnicodeEncodeError:
            raise InvalidError("user-data is not text (UTF-8)") from None
        if size > MAX_USER_DATA:
            raise InvalidError(f"user-data is larger than {format_size(MAX_USER_DATA)}")


def _check_text(text: str, what: str, limit: int) -> None:
    if len(text) > limit or not text.isascii() or not (text.isprintable() or not text):
        raise InvalidError(f"the {what} must be printable ASCII of at most {limit} characters")
