"""Graphics adapter, keyboard and pointer, and the VNC server that shows them."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.hypervisor.devices.base import DISPLAY, USB
from undercroft.hypervisor.line import Line
from undercroft.model.vm import Display

__all__ = ["Graphics", "NoGraphics", "UsbInput"]


@dataclass(frozen=True)
class Graphics:
    """An adapter. VNC listens nowhere: a viewer's connection is handed to QEMU when there is one
    (QMP ``add_client``)."""

    display: Display

    def add_to(self, line: Line) -> None:
        """Adds adapter and display."""
        line.add("-vnc", "none")
        if self.display is Display.STD:
            line.device("VGA" if line.x86 else "bochs-display", DISPLAY, id="video0")
        elif line.x86:
            line.device("virtio-vga", DISPLAY, id="video0")
        else:
            line.virtio("gpu", DISPLAY, id="video0")


@dataclass(frozen=True)
class NoGraphics:
    """No adapter, no display."""

    def add_to(self, line: Line) -> None:
        """Says so."""
        line.add("-display", "none")


@dataclass(frozen=True)
class UsbInput:
    """A tablet, whose pointer is where the viewer's is; and a keyboard where the board has no
    PS/2 one."""

    def add_to(self, line: Line) -> None:
        """Adds the controller and what is plugged in."""
        line.device("qemu-xhci", USB, id="usb", p2=4, p3=4)
        line.device("usb-tablet", id="tablet", bus="usb.0", port="1")
        if not line.x86:
            line.device("usb-kbd", id="keyboard", bus="usb.0", port="2")
