"""Plans that unit tests share, with every value that could vary fixed."""

from __future__ import annotations

from typing import Any

from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.firmware import FirmwareFiles
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, MachinePlan, PlanDisk
from undercroft.model.vm import Firmware

OVMF = FirmwareFiles(code="/usr/share/OVMF/CODE.fd", variables="/usr/share/OVMF/VARS.fd")
OVMF_SECURE = FirmwareFiles(
    code="/usr/share/OVMF/CODE.ms.fd", variables="/usr/share/OVMF/VARS.ms.fd", smm=True
)


def emulator(arch: str = "x86_64", version: tuple[int, int, int] = (10, 0, 2)) -> Emulator:
    return Emulator(arch=arch, path=f"/usr/bin/qemu-system-{arch}", version=version)


def plan(**changes: Any) -> MachinePlan:
    """A small VM that boots a kernel directly."""
    values: dict[str, Any] = {
        "id": "0198f5a2b3c4d5e6f708",
        "name": "web1",
        "uuid": "5e0b51f2-3a0b-4a1e-8b0e-4d2f0f0a9c11",
        "directory": "/data/vms/0198f5a2b3c4d5e6f708",
        "run_directory": "/data/run/vms/0198f5a2b3c4d5e6f708",
        "firmware": Firmware.KERNEL,
        "kernel": "/data/images/abc/kernel",
        "initrd": "/data/images/abc/initrd",
        "kernel_arguments": "console=ttyS0 quiet",
    }
    return MachinePlan(**{**values, **changes})


def from_disk(**changes: Any) -> MachinePlan:
    """A VM that boots from its disk, an overlay over an image."""
    values: dict[str, Any] = {
        "firmware": Firmware.BIOS,
        "kernel": None,
        "initrd": None,
        "kernel_arguments": "",
        "memory": 1 << 30,
        "cpus": 2,
        "disks": (overlay(boot_index=0),),
        "seed": "/data/vms/0198f5a2b3c4d5e6f708/seed.iso",
        "vmgenid": "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
    }
    return plan(**{**values, **changes})


def overlay(number: int = 1, **changes: Any) -> PlanDisk:
    """A volume over an image that other disks may share."""
    values: dict[str, Any] = {
        "path": f"/data/volumes/vol{number}.qcow2",
        "format": DiskFormat.QCOW2,
        "backing": (DiskLayer(path="/data/images/abc/disk.qcow2", format=DiskFormat.QCOW2),),
        "serial": f"vol{number}",
    }
    return PlanDisk(**{**values, **changes})
