"""Small devices that guest and host work together through."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.devices.base import BALLOON, PVPANIC, RNG
from undercroft.hypervisor.line import Line

__all__ = ["Balloon", "GenerationId", "PanicNotifier", "RandomSource"]


@dataclass(frozen=True)
class RandomSource:
    """virtio-rng: the guest has entropy from its first second."""

    def add_to(self, line: Line) -> None:
        """Adds the source."""
        line.add("-object", "rng-builtin,id=rng0")
        line.virtio("rng", RNG, id="rng0-dev", rng="rng0")


@dataclass(frozen=True)
class Balloon:
    """virtio-balloon: the guest reports pages that it does not use, and the host takes them back
    by itself."""

    def add_to(self, line: Line) -> None:
        """Adds the balloon."""
        line.virtio("balloon", BALLOON, id="balloon0", free_page_reporting=True)


@dataclass(frozen=True)
class PanicNotifier:
    """pvpanic: the guest's kernel says that it panicked. On the ISA bus of a PC, found through
    ACPI (Linux since 3.10, Windows); on PCI elsewhere (Linux since 5.13)."""

    def add_to(self, line: Line) -> None:
        """Adds the notifier."""
        if line.x86:
            line.device("pvpanic", id="panic")
        else:
            line.device("pvpanic-pci", PVPANIC, id="panic")


@dataclass(frozen=True)
class GenerationId:
    """VMGENID: changes when a guest's state is copied or goes back in time, so that the guest
    reseeds its random generator (specification: Microsoft, "Virtual Machine Generation ID")."""

    guid: str

    def add_to(self, line: Line) -> None:
        """Adds the device."""
        line.device("vmgenid", id="vmgenid0", guid=self.guid)
