"""The channel to the guest agent."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.devices.base import SERIAL
from undercroft.hypervisor.line import Line

__all__ = ["AGENT_PORT", "AgentChannel"]

AGENT_PORT = "org.qemu.guest_agent.0"


@dataclass(frozen=True)
class AgentChannel:
    """A virtio-serial port under the name that qemu-ga looks for."""

    def add_to(self, line: Line) -> None:
        """Adds controller and port."""
        descriptor = line.listener("agent")
        line.option("-chardev", "socket", id="agent", fd=descriptor, server=True, wait=False)
        line.virtio("serial", SERIAL, id="serial-bus")
        line.device(
            "virtserialport", id="agent-port", bus="serial-bus.0", chardev="agent", name=AGENT_PORT
        )
