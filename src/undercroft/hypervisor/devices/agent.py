"""The channels to the guest agent, and to the helper that makes clones somebody else."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.devices.base import SERIAL
from undercroft.hypervisor.helper import HELPER_PORT
from undercroft.hypervisor.line import Line

__all__ = ["AGENT_PORT", "AgentChannel", "HelperChannel"]

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


@dataclass(frozen=True)
class HelperChannel:
    """A port beside the agent's. A guest goes on with the port as open or closed as it was, so who
    reads its state is connected before that, and QEMU waits for them."""

    incoming: bool

    def add_to(self, line: Line) -> None:
        """Adds the port."""
        descriptor = line.listener("helper")
        line.option(
            "-chardev", "socket", id="helper", fd=descriptor, server=True, wait=self.incoming
        )
        line.device(
            "virtserialport",
            id="helper-port",
            bus="serial-bus.0",
            chardev="helper",
            name=HELPER_PORT,
        )
