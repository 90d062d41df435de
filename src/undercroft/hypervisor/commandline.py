"""From a plan to the arguments of QEMU, and what it is handed along with them.

QEMU gets no path that it could open something else by: disks, firmware, kernel and sockets are
descriptors. The only files that it opens itself are its own data (BIOS, option ROMs).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from undercroft.hypervisor.board import add_board, check_plan
from undercroft.hypervisor.devices.agent import AgentChannel, HelperChannel
from undercroft.hypervisor.devices.base import Device
from undercroft.hypervisor.devices.display import Graphics, NoGraphics, UsbInput
from undercroft.hypervisor.devices.network import NetworkAdapter, UserNetwork
from undercroft.hypervisor.devices.paravirtual import (
    Balloon,
    GenerationId,
    PanicNotifier,
    RandomSource,
)
from undercroft.hypervisor.devices.places import SATA_PORTS, place_cdroms, place_disks
from undercroft.hypervisor.devices.ports import HotPort
from undercroft.hypervisor.devices.seed import Seed, SeedCdrom
from undercroft.hypervisor.devices.serial import SerialConsole
from undercroft.hypervisor.devices.tpm import Tpm
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.firmware import FirmwareFiles
from undercroft.hypervisor.line import Handle, Line
from undercroft.hypervisor.plan import MachinePlan
from undercroft.model.errors import InvalidError
from undercroft.model.vm import DiskBus, Display, Firmware, Machine

__all__ = ["SANDBOX", "CommandLine", "command_line", "needs_tsc"]

_TOKEN = re.compile(r"@([a-z0-9.-]+)@")
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class CommandLine:
    """Program and arguments, with ``@name@`` where the number of a handle belongs."""

    argv: tuple[str, ...]
    handles: tuple[Handle, ...]

    def with_descriptors(self, numbers: Mapping[str, int]) -> list[str]:
        """The arguments with the numbers put in. Only tokens of our own handles are replaced,
        never text that looks like one in a name or a kernel argument of the user's."""
        known = {handle.token: str(numbers[handle.name]) for handle in self.handles}
        return [
            argument
            if previous in ("-append", "-name")
            else _TOKEN.sub(lambda match: known.get(match[0], match[0]), argument)
            for previous, argument in zip(("", *self.argv), self.argv, strict=False)
        ]


def needs_tsc(plan: MachinePlan) -> bool:
    """Whether `command_line` wants to know the frequency of the host's time stamp counter."""
    return plan.machine is Machine.MICROVM and plan.accelerator == "tcg"


def command_line(
    plan: MachinePlan,
    emulator: Emulator,
    firmware: FirmwareFiles | None = None,
    *,
    tsc_khz: int | None = None,
) -> CommandLine:
    """The command line of a plan. ``firmware`` is needed for `Firmware.UEFI`; ``tsc_khz`` is told
    to the kernel of a guest that cannot find out reliably (`needs_tsc`).

    Raises:
        InvalidError, UnsupportedError: no such machine can be.
    """
    check_plan(plan)
    if (plan.firmware is Firmware.UEFI) != (firmware is not None):
        raise InvalidError("firmware files and firmware uefi go together")
    line = Line(plan, emulator)
    line.add(emulator.path)
    line.option("-name", "", guest=plan.name, process=f"croft-{plan.id[:8]}", debug_threads=True)
    line.add("-uuid", plan.uuid)
    line.add("-nodefaults", "-no-user-config")
    line.add("-sandbox", SANDBOX)
    line.add("-msg", "timestamp=on")
    # A guest that ends itself leaves QEMU paused, to be asked why before it is let go.
    line.add("-action", "shutdown=pause,panic=pause,reboot=reset")
    add_board(line, firmware, tsc_khz)
    line.option("-chardev", "socket", id="qmp", fd=line.listener("qmp"), server=True, wait=False)
    line.add("-mon", "chardev=qmp,mode=control")
    if plan.machine is not Machine.MICROVM and line.x86:
        # Time that passed while the host did not run us is caught up slowly, not in a burst.
        line.add("-rtc", "base=utc,driftfix=slew")
    else:
        line.add("-rtc", "base=utc")
    for device in _devices(plan):
        device.add_to(line)
    if plan.incoming is not None:
        line.add("-incoming", "defer")
        line.add("-S")  # the guest may have run when it was saved; it goes on when it is told to
    return CommandLine(tuple(line.argv), tuple(line.handles))


def _devices(plan: MachinePlan) -> Iterator[Device]:
    yield SerialConsole()
    yield Graphics(plan.display) if plan.display is not Display.NONE else NoGraphics()
    if plan.rng:
        yield RandomSource()
    if plan.balloon:
        yield Balloon()
    if plan.agent:
        yield AgentChannel()
        if plan.helper:
            yield HelperChannel(plan.incoming is not None)
    if plan.pvpanic:
        yield PanicNotifier()
    if plan.vmgenid is not None and plan.machine is Machine.Q35:
        yield GenerationId(plan.vmgenid)
    if plan.tpm:
        yield Tpm()
    if plan.display is not Display.NONE:
        yield UsbInput()
    yield from _disks(plan)
    for index, port in enumerate(plan.ports):
        yield UserNetwork(port, index)
        yield NetworkAdapter(port, index, len(plan.ports))


def _disks(plan: MachinePlan) -> Iterator[Device]:
    """Disks, CD-ROM drives and the seed, each at its place."""
    for number in range(plan.hot_ports):
        yield HotPort(number)
    yield from place_disks(plan)
    yield from place_cdroms(plan)
    sata = sum(disk.bus is DiskBus.SATA for disk in plan.disks)
    if plan.seed is not None:
        if sata and sata == len(plan.disks):
            yield SeedCdrom(plan.seed, sata)
            sata += 1
        else:
            yield Seed(plan.seed)
    sata += sum(drive.bus is DiskBus.SATA for drive in plan.cdroms)
    if sata > SATA_PORTS:
        raise InvalidError(f"{sata} SATA disks: at most {SATA_PORTS} fit on the board")
