"""The serial console."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.line import Line

__all__ = ["SerialConsole"]


@dataclass(frozen=True)
class SerialConsole:
    """The first serial port, on a unix socket.

    QEMU waits for the reader, who is in the socket's backlog already, so that not a byte of early
    output is lost; when the reader goes away later, QEMU runs on and listens again.
    """

    def add_to(self, line: Line) -> None:
        """Adds the port."""
        descriptor = line.listener("serial")
        line.option("-chardev", "socket", id="serial0", fd=descriptor, server=True, wait=True)
        line.add("-serial", "chardev:serial0")
