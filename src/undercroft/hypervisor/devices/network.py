"""Network adapters and the user-mode network behind them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from undercroft.hypervisor.devices.base import nic_slot
from undercroft.hypervisor.line import Line, escape
from undercroft.hypervisor.plan import PlanForward, PlanPort
from undercroft.model.vm import NicModel, PortMode

__all__ = ["NetworkAdapter", "UserNetwork", "forward_rule"]


@dataclass(frozen=True)
class UserNetwork:
    """A private NAT inside QEMU (libslirp): needs no privilege. RESTRICTED lets nothing out,
    not even to the host; forwarded ports still lead in."""

    port: PlanPort
    index: int

    def add_to(self, line: Line) -> None:
        """Adds the network."""
        parts = ["user", f"id=net{self.index}"]
        if self.port.mode is PortMode.RESTRICTED:
            parts.append("restrict=on")
        if self.port.hostname:
            parts.append(f"hostname={escape(self.port.hostname)}")
        parts += [f"hostfwd={escape(forward_rule(forward))}" for forward in self.port.forwards]
        line.add("-netdev", ",".join(parts))
        if self.port.apart:
            line.add(
                "-netdev", f"hubport,id={_adapter_end(self.port, self.index)},hubid={self.index}"
            )


def _adapter_end(port: PlanPort, index: int) -> str:
    """What an adapter is plugged into: the network, or a hub that nobody else is plugged into."""
    return f"idle{index}" if port.apart else f"net{index}"


def forward_rule(forward: PlanForward) -> str:
    """A forwarded port as QEMU writes it: ``tcp:127.0.0.1:8080-:80``."""
    address = ipaddress.ip_address(forward.host_address)
    host = f"[{address}]" if address.version == 6 else str(address)
    return f"{forward.protocol.value}:{host}:{forward.host_port}-:{forward.guest_port}"


@dataclass(frozen=True)
class NetworkAdapter:
    """A network card. Without a boot index it gets no option ROM: that is 256 KiB to load and
    seconds of firmware time under TCG for a boot that nobody asked for."""

    port: PlanPort
    index: int
    count: int

    def add_to(self, line: Line) -> None:
        """Adds the adapter."""
        slot = nic_slot(self.index, self.count)
        values: dict[str, object] = {
            "id": f"net{self.index}-dev",
            "netdev": _adapter_end(self.port, self.index),
            "mac": self.port.mac,
            "bootindex": self.port.boot_index,
        }
        if line.pci and self.port.boot_index is None:
            values["romfile"] = ""
        if self.port.model is NicModel.VIRTIO:
            line.virtio("net", slot, **values)
        else:
            line.device("e1000e", slot, **values)
