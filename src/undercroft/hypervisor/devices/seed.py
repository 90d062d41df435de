"""The NoCloud seed: a small read-only medium that tells cloud-init about the guest."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.blockgraph import add_iso
from undercroft.hypervisor.devices.base import SEED
from undercroft.hypervisor.line import Line

__all__ = ["Seed"]


@dataclass(frozen=True)
class Seed:
    """The seed as a virtio disk: cloud-init finds it by its label, whatever the bus."""

    path: str

    def add_to(self, line: Line) -> None:
        """Adds the medium."""
        line.virtio("blk", SEED, id="seed-dev", drive=add_iso(line, "seed", self.path))


@dataclass(frozen=True)
class SeedCdrom:
    """The seed as a CD-ROM on the AHCI controller, for guests without virtio drivers."""

    path: str
    unit: int

    def add_to(self, line: Line) -> None:
        """Adds the medium."""
        line.device(
            "ide-cd",
            id="seed-dev",
            bus=f"ide.{self.unit}",
            drive=add_iso(line, "seed", self.path),
        )
