"""The board, its processors, memory and firmware: what QEMU is told with options of its own."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from undercroft.hypervisor.firmware import FirmwareFiles
from undercroft.hypervisor.line import HandleKind, Line
from undercroft.hypervisor.plan import MachinePlan
from undercroft.model.errors import InvalidError, UnsupportedError
from undercroft.model.vm import DiskBus, Display, Firmware, Machine, NicModel

__all__ = ["add_board", "check_plan", "kvm_group", "machine_version", "needs_sata", "nvram_path"]

_X86 = ("x86_64", "i386")
# MiB of translated code that TCG keeps. Boot times are the same from 32 to 512; memory is not.
_TRANSLATION_CACHE = 256
# What each board calls its memory; a migration stream knows it by that name.
_MEMORY = {Machine.Q35: "pc.ram", Machine.MICROVM: "microvm.ram", Machine.VIRT: "mach-virt.ram"}
_MAPS_READ_ONLY = (8, 2, 0)
_KVM_DEVICE = "/dev/kvm"
_TAKES_KVM_DEVICE = (9, 0, 0)


def check_plan(plan: MachinePlan) -> None:
    """Refuses what no QEMU can do.

    Raises:
        InvalidError: the parts contradict each other.
        UnsupportedError: this board cannot have them.
    """
    if plan.machine is Machine.VIRT and plan.arch in _X86:
        raise InvalidError("machine type virt is not a PC: use q35 or microvm for x86 guests")
    if plan.machine is not Machine.VIRT and plan.arch not in _X86:
        raise InvalidError(f"machine type {plan.machine.value} is a PC: use virt for {plan.arch}")
    if (plan.firmware is Firmware.KERNEL) != (plan.kernel is not None):
        raise InvalidError("firmware kernel and a kernel to boot go together")
    if plan.firmware is Firmware.BIOS and plan.arch not in _X86:
        raise InvalidError(f"{plan.arch} has no BIOS: use firmware uefi or kernel")
    if plan.secure_boot and plan.firmware is not Firmware.UEFI:
        raise InvalidError("secure boot needs firmware uefi")
    if plan.machine is Machine.MICROVM:
        if plan.firmware is not Firmware.KERNEL:
            raise UnsupportedError("a microvm boots a kernel directly", action="use machine q35")
        if plan.display is not Display.NONE:
            raise UnsupportedError("a microvm has no display", action="use display none")
        if plan.tpm:
            raise UnsupportedError("a microvm has no TPM", action="use machine q35")
        if {DiskBus.SATA, DiskBus.NVME} & set(plan.buses):
            raise UnsupportedError("a microvm has no SATA or NVMe", action="use bus virtio")
        if any(port.model is not NicModel.VIRTIO for port in plan.ports):
            raise UnsupportedError("a microvm has virtio adapters only")
    if plan.machine is Machine.VIRT and needs_sata(plan):
        raise UnsupportedError("the virt board has no SATA", action="use bus virtio")
    names = [plan.id, plan.name, plan.kernel_arguments]
    if any("\0" in text or "\n" in text for text in names):
        raise InvalidError("a name or kernel argument contains a newline or zero byte")


def machine_version(plan: MachinePlan, version: tuple[int, int, int]) -> str | None:
    """The board version that a plan gets from this QEMU; microvm has none."""
    if plan.machine is Machine.MICROVM:
        return None
    return plan.machine_version or f"{version[0]}.{version[1]}"


def needs_sata(plan: MachinePlan) -> bool:
    """Whether anything sits on the AHCI controller. Without it firmware and guest have six ports
    fewer to probe."""
    return DiskBus.SATA in plan.buses


def nvram_path(plan: MachinePlan) -> str:
    """Where the firmware's variables of this VM are kept."""
    return str(PurePosixPath(plan.directory) / "nvram.fd")


def add_board(line: Line, firmware: FirmwareFiles | None, tsc_khz: int | None) -> None:
    """Adds board, accelerator, processors, memory and firmware."""
    plan = line.plan
    _add_machine(line, firmware)
    if plan.accelerator == "kvm":
        line.add("-accel", _kvm(line))
        line.add("-cpu", plan.cpu_model or "host")
    else:
        line.option("-accel", "tcg", thread="multi", tb_size=_TRANSLATION_CACHE)
        line.add("-cpu", plan.cpu_model or _default_cpu(line))
    line.add("-smp", f"cpus={plan.cpus},sockets=1,cores={plan.cpus},threads=1")
    line.add("-m", f"size={plan.memory // 1024}k")
    if plan.memory_file is not None:
        _add_memory(line, plan.memory_file)
    if firmware is not None:
        _add_flash(line, firmware)
    if plan.machine is Machine.MICROVM:
        # The default with ACPI, SeaBIOS, starts a kernel only through option ROMs.
        line.add("-bios", "qboot.rom")
    if plan.kernel is not None:
        _add_kernel(line, plan.kernel, tsc_khz)
    elif line.x86:
        line.add("-boot", "menu=off,strict=on")


def _kvm(line: Line) -> str:
    """KVM on a descriptor of its device, which QEMU has no right to open by itself; before 9.0 it
    cannot take one, and is given the device's group instead (`kvm_group`)."""
    if line.version < _TAKES_KVM_DEVICE:
        return "kvm"
    return f"kvm,device={line.file('kvm', _KVM_DEVICE, write=True)}"


def kvm_group(plan: MachinePlan) -> int | None:
    """The group that may open the KVM device, for a QEMU that runs as somebody else with KVM."""
    if plan.accelerator != "kvm" or plan.uid is None:
        return None
    try:
        return os.stat(_KVM_DEVICE).st_gid
    except FileNotFoundError:
        return None


def _default_cpu(line: Line) -> str:
    # Pointer authentication with the architected algorithm takes half of the time under TCG.
    return "max,pauth-impdef=on" if line.plan.arch == "aarch64" else "max"


def _add_machine(line: Line, firmware: FirmwareFiles | None) -> None:
    plan = line.plan
    version = machine_version(plan, line.version)
    values: dict[str, object] = {"dump_guest_core": False}
    if plan.machine is Machine.Q35:
        head = f"pc-q35-{version}"
        values |= {"vmport": False, "smbus": False, "sata": needs_sata(plan), "hpet": False}
        values["smm"] = firmware is not None and firmware.smm
    elif plan.machine is Machine.MICROVM:
        head = "microvm"
        values |= {"x_option_roms": False, "acpi": True, "rtc": True}
        # No old interrupt controller: ACPI tells of none, so newer kernels (Debian's 6.1.192) do
        # not set it up, and its first timer interrupt would come as vector 0, a divide error.
        values["pic"] = False
    else:
        head = f"virt-{version}"
        if plan.arch == "aarch64" and plan.accelerator == "tcg":
            values["gic_version"] = 3
    if plan.memory_file is not None:
        values["memory_backend"] = _MEMORY[plan.machine]
    if firmware is not None:
        values |= {"pflash0": "firmware", "pflash1": "nvram"}
    line.option("-machine", head, **values)


def _add_memory(line: Line, path: str) -> None:
    """Memory mapped from a file. A private mapping needs the file for reading only, which QEMU
    can be told since 8.2; it opens the file by name, so the name is that of the descriptor (whose
    file must be accessible to the uid that QEMU runs as)."""
    shared = line.plan.memory_shared
    kind = HandleKind.WRITE if shared else HandleKind.READ
    values: dict[str, object] = {}
    if not shared:
        if line.version < _MAPS_READ_ONLY:
            raise UnsupportedError(
                "only QEMU 8.2 and newer can share memory between VMs",
                action="install a newer QEMU: script/setup",
            )
        values = {"readonly": True, "rom": False}
    line.option(
        "-object",
        "memory-backend-file",
        id=_MEMORY[line.plan.machine],
        size=line.plan.memory,
        mem_path=f"/proc/self/fd/{line.handle('memory', kind, path)}",
        share=shared,
        **values,
    )


def _add_flash(line: Line, firmware: FirmwareFiles) -> None:
    for node, path, write in (
        ("firmware", firmware.code, False),
        ("nvram", nvram_path(line.plan), True),
    ):
        line.blockdev(
            {
                "driver": "file",
                "node-name": f"{node}-file",
                "filename": line.file(node, path, write=write),
                "read-only": not write,
            }
        )
        line.blockdev(
            {
                "driver": "raw",
                "node-name": node,
                "file": f"{node}-file",
                "read-only": not write,
            }
        )
    if firmware.smm:
        line.add("-global", "driver=cfi.pflash01,property=secure,value=on")
        # The firmware cannot protect itself across a suspend to RAM.
        line.add("-global", "ICH9-LPC.disable_s3=1")


def _add_kernel(line: Line, path: str, tsc_khz: int | None) -> None:
    """A kernel is read once, when QEMU starts; QEMU opens it by name, so the name is that of the
    descriptor (whose file must be readable by the uid that QEMU runs as)."""
    plan = line.plan
    kernel = line.handle("kernel", HandleKind.READ, path)
    line.add("-kernel", f"/proc/self/fd/{kernel}")
    if plan.initrd is not None:
        initrd = line.handle("initrd", HandleKind.READ, plan.initrd)
        line.add("-initrd", f"/proc/self/fd/{initrd}")
    arguments = plan.kernel_arguments
    if tsc_khz is not None and "tsc_early_khz=" not in arguments:
        arguments = f"{arguments} tsc_early_khz={tsc_khz}".lstrip()
    if arguments:
        line.add("-append", arguments)
