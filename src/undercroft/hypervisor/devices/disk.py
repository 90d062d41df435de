"""Disks, for each bus that they can be on."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.blockgraph import add_disk
from undercroft.hypervisor.line import Line, Slot
from undercroft.hypervisor.plan import PlanDisk

__all__ = ["NvmeDisk", "SataDisk", "ScsiController", "ScsiDisk", "VirtioDisk"]

# A host without space pauses the guest instead of telling it that its disk is broken; it goes on
# where it stopped once there is room. Other errors are the guest's to handle.
_ERRORS = {"werror": "enospc", "rerror": "report"}


@dataclass(frozen=True)
class VirtioDisk:
    """virtio-blk: the least work for guest and host."""

    disk: PlanDisk
    index: int
    slot: Slot

    def add_to(self, line: Line) -> None:
        """Adds the disk."""
        line.virtio(
            "blk",
            self.slot,
            id=f"disk{self.index}-dev",
            drive=add_disk(line, f"disk{self.index}", self.disk),
            serial=self.disk.serial or None,
            bootindex=self.disk.boot_index,
            **_ERRORS,
        )


@dataclass(frozen=True)
class ScsiController:
    """virtio-scsi: one controller for all SCSI disks."""

    slot: Slot

    def add_to(self, line: Line) -> None:
        """Adds the controller."""
        line.virtio("scsi", self.slot, id="scsi")


@dataclass(frozen=True)
class ScsiDisk:
    """A disk on the SCSI controller."""

    disk: PlanDisk
    index: int
    unit: int

    def add_to(self, line: Line) -> None:
        """Adds the disk."""
        line.device(
            "scsi-hd",
            id=f"disk{self.index}-dev",
            bus="scsi.0",
            scsi_id=self.unit,
            drive=add_disk(line, f"disk{self.index}", self.disk),
            serial=self.disk.serial or None,
            bootindex=self.disk.boot_index,
            **_ERRORS,
        )


@dataclass(frozen=True)
class SataDisk:
    """A disk on the board's AHCI controller: for guests without virtio drivers."""

    disk: PlanDisk
    index: int
    unit: int

    def add_to(self, line: Line) -> None:
        """Adds the disk."""
        line.device(
            "ide-hd",
            id=f"disk{self.index}-dev",
            bus=f"ide.{self.unit}",
            drive=add_disk(line, f"disk{self.index}", self.disk),
            serial=self.disk.serial or None,
            bootindex=self.disk.boot_index,
            **_ERRORS,
        )


@dataclass(frozen=True)
class NvmeDisk:
    """An NVMe controller with one namespace. Its serial number is mandatory, and it knows no
    error policy: errors, also of a full host, go to the guest."""

    disk: PlanDisk
    index: int
    slot: Slot

    def add_to(self, line: Line) -> None:
        """Adds the disk."""
        line.device(
            "nvme",
            self.slot,
            id=f"disk{self.index}-dev",
            drive=add_disk(line, f"disk{self.index}", self.disk),
            serial=self.disk.serial or f"disk{self.index}",
            bootindex=self.disk.boot_index,
        )
