"""CD-ROM drives. They are there from the beginning; what is in them comes and goes
(`undercroft.hypervisor.medium`)."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.blockgraph import add_iso
from undercroft.hypervisor.line import HandleKind, Line
from undercroft.hypervisor.plan import PlanCdrom

__all__ = ["SataCdrom", "ScsiCdrom"]

_SCSI_ID = 16  # of the first: beyond those of disks


@dataclass(frozen=True)
class SataCdrom:
    """A drive on the board's AHCI controller, which every system and its installer know."""

    drive: PlanCdrom
    port: int

    def add_to(self, line: Line) -> None:
        """Adds the drive, with what is in it."""
        line.device(
            "ide-cd",
            id=f"cd{self.drive.unit}-dev",
            bus=f"ide.{self.port}",
            drive=_medium(line, self.drive),
            bootindex=self.drive.boot_index,
        )


@dataclass(frozen=True)
class ScsiCdrom:
    """A drive on the SCSI controller, for boards without SATA."""

    drive: PlanCdrom

    def add_to(self, line: Line) -> None:
        """Adds the drive, with what is in it."""
        line.device(
            "scsi-cd",
            id=f"cd{self.drive.unit}-dev",
            bus="scsi.0",
            scsi_id=_SCSI_ID + self.drive.unit,
            drive=_medium(line, self.drive),
            bootindex=self.drive.boot_index,
        )


def _medium(line: Line, drive: PlanCdrom) -> str | None:
    if drive.path is None:
        return None
    name = drive.node or f"cd{drive.unit}"
    return add_iso(line, name, drive.path, HandleKind.MEDIUM)
