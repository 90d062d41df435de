"""Ports behind which devices come and go while the guest runs."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.devices.base import port_slot
from undercroft.hypervisor.line import Line

__all__ = ["HotPort"]


@dataclass(frozen=True)
class HotPort:
    """A PCI Express root port with nothing behind it yet. It reserves no I/O ports, of which there
    are too few for many: what we plug in needs none."""

    number: int

    def add_to(self, line: Line) -> None:
        """Adds the port."""
        line.device(
            "pcie-root-port",
            port_slot(self.number),
            id=f"port{self.number}",
            chassis=self.number + 1,
            io_reserve=0,
        )
