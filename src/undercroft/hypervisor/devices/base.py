"""What all devices share, and where each sits on the PCI bus.

Places are fixed per kind of device, never in order of appearance: adding a network adapter must
not move the disks, or a guest suspended before the change could not be resumed after an update
of Undercroft, and guests that name interfaces by slot would lose them.

    00  host bridge      05     pvpanic             0d-18  disks and their controllers
    01  display          06     USB                 19     seed
    02  entropy          07-0c  network adapters    1c-1e  free
    03  balloon              1a-1b  hot-plug ports  1f     (q35) ISA bridge, AHCI
    04  virtio-serial

What is on the root bus itself stays there while the guest runs. Disks but for the first are each
behind a port of their own, where they can come and go; the last port is the SCSI controller's.
"""

from __future__ import annotations

from typing import Protocol

from undercroft.hypervisor.line import Line, Slot
from undercroft.model.errors import InvalidError

__all__ = [
    "BALLOON",
    "DISPLAY",
    "HOT_PORTS",
    "PVPANIC",
    "RNG",
    "SCSI_PORT",
    "SEED",
    "SERIAL",
    "USB",
    "Device",
    "disk_slot",
    "in_port",
    "nic_slot",
    "port_slot",
]

DISPLAY = Slot(0x01)
RNG = Slot(0x02)
BALLOON = Slot(0x03)
SERIAL = Slot(0x04)
PVPANIC = Slot(0x05)
USB = Slot(0x06)
SEED = Slot(0x19)

HOT_PORTS = 16
SCSI_PORT = HOT_PORTS - 1
_NIC_SLOTS = range(0x07, 0x0D)
_DISK_SLOTS = range(0x0D, 0x19)
_FUNCTIONS = 8


class Device(Protocol):
    """A part of the machine that knows how to ask QEMU for itself."""

    def add_to(self, line: Line) -> None:
        """Adds its arguments and handles."""


def port_slot(number: int) -> Slot:
    """The place of hot-plug port ``number`` itself."""
    slot, function = divmod(number, _FUNCTIONS)
    return Slot(0x1A + slot, function, shared=function == 0)


def in_port(number: int) -> Slot:
    """The place behind hot-plug port ``number``."""
    return Slot(0, bus=f"port{number}")


def nic_slot(index: int, count: int) -> Slot:
    """The place of network adapter ``index`` of ``count``.

    Raises:
        InvalidError: there are more than fit.
    """
    return _spread(_NIC_SLOTS, index, count, "network adapters")


def disk_slot(index: int, count: int) -> Slot:
    """The place of disk ``index`` of ``count`` that are on the bus themselves.

    Raises:
        InvalidError: there are more than fit.
    """
    return _spread(_DISK_SLOTS, index, count, "disks")


def _spread(slots: range, index: int, count: int, what: str) -> Slot:
    # Slots are filled with a first function each before any gets a second: guests look for
    # functions only where there is a first.
    most = len(slots) * _FUNCTIONS
    if count > most:
        raise InvalidError(f"{count} {what}: at most {most} fit on the board")
    function, position = divmod(index, len(slots))
    return Slot(slots[position], function, shared=function == 0 and count > len(slots))
