"""Disks, and drives for discs, that come and go while the guest runs.

A disk is described by the same classes as on the command line, so that a machine which is begun
anew from its plan is the one that it had become. Every step asks QEMU first how far it is, and can
be repeated.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from undercroft.hypervisor.bitmaps import drop_useless
from undercroft.hypervisor.blockgraph import block_nodes, drop_nodes, hand_over
from undercroft.hypervisor.devices.cdrom import ScsiCdrom
from undercroft.hypervisor.devices.places import hot_disk, scsi_controller
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.line import HandleKind, Line, escape
from undercroft.hypervisor.medium import change_medium
from undercroft.hypervisor.plan import MachinePlan, PlanCdrom, PlanDisk
from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.secret import give_secret
from undercroft.model.errors import QmpError, TimeLimitError, UnsupportedError
from undercroft.model.vm import DiskBus, Machine
from undercroft.model.volume import IOLimits

__all__ = [
    "RELEASE_TIMEOUT",
    "check_pluggable",
    "limit",
    "plug",
    "plug_drive",
    "present",
    "resize",
    "unplug",
    "unplug_drive",
]

RELEASE_TIMEOUT = 30.0  # seconds that a guest gets to let go of a disk
_POLL = 0.1
_BURST = 10  # how much more a guest may do in a burst


def check_pluggable(plan: MachinePlan, bus: DiskBus, unit: int) -> None:
    """Does nothing if a disk can come to, or go from, this place of a running machine.

    Raises:
        UnsupportedError: it cannot.
    """
    if plan.machine is Machine.MICROVM:
        raise UnsupportedError(
            "a microvm takes no disks while it runs, and gives none back",
            action="stop it first, or use --machine q35",
        )
    if bus is DiskBus.SATA:
        raise UnsupportedError(
            "a SATA disk can neither be attached nor detached while the VM runs",
            action="stop the VM first, or use --bus virtio, scsi or nvme",
        )
    if not plan.hot_ports:
        raise UnsupportedError(
            "this VM was started by an older Undercroft, without places for more disks",
            action="restart it first: croft restart",
        )
    if unit == 0 and bus is not DiskBus.SCSI:
        raise UnsupportedError("the first disk stays while the VM runs", action="stop the VM first")


@dataclass
class _Recorder(Line):
    """Takes down what a device would add to a command line."""

    steps: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    paths: dict[str, tuple[str, bool]] = field(default_factory=dict)

    def option(self, flag: str, head: str, /, **values: object) -> None:
        """A device to add."""
        named = {key.replace("_", "-"): value for key, value in values.items()}
        given = {
            # What is on, off or automatic is a word to QEMU; no plain boolean is among these.
            key: escape(value) if isinstance(value, bool) else value
            for key, value in named.items()
            if value is not None
        }
        self.steps.append(("device_add", {"driver": head, **given}))

    def blockdev(self, node: Mapping[str, Any]) -> None:
        """A node to add."""
        self.steps.append(("blockdev-add", dict(node)))

    def secret(self, node: str, path: str) -> None:
        """A key to give before its node is added."""
        self.steps.append(("object-add", {"node": node, "path": path}))

    def file(
        self, name: str, path: str, *, write: bool = False, kind: HandleKind = HandleKind.READ
    ) -> str:
        """A file to hand over when its node is added."""
        self.paths[name] = (path, write)
        return name


async def present(monitor: Monitor) -> set[str]:
    """The ids of all devices that are there."""
    found = await monitor.execute("qom-list", {"path": "/machine/peripheral"})
    return {item["name"] for item in found}


async def plug(monitor: Monitor, plan: MachinePlan, disk: PlanDisk) -> None:
    """Gives the machine a disk, whose place is free. May be repeated.

    Raises:
        UnsupportedError: it cannot come while the guest runs.
        QmpError, TimeLimitError, OSError: it did not work; the machine is as it was.
    """
    check_pluggable(plan, disk.bus, disk.unit)
    emulator = Emulator(arch=plan.arch, path="", version=monitor.version)
    devices = await present(monitor)
    id = f"disk{disk.unit}-dev"
    if id in devices:
        return
    recorder = _Recorder(plan, emulator)
    if disk.bus is DiskBus.SCSI and "scsi" not in devices:
        scsi_controller().add_to(recorder)
    hot_disk(disk, disk.unit).add_to(recorder)
    try:
        for command, arguments in recorder.steps:
            if command == "blockdev-add":
                await _add_node(monitor, recorder, arguments)
            elif command == "object-add":
                await give_secret(monitor, arguments["node"], arguments["path"])
            else:
                await monitor.execute(command, arguments)
        if disk.limits != IOLimits():
            await limit(monitor, id, disk.limits)
    except BaseException:
        if monitor.connected:
            with contextlib.suppress(QmpError, TimeLimitError):
                if id not in await present(monitor):
                    await asyncio.shield(_drop_nodes(monitor, disk))
        raise


async def _add_node(monitor: Monitor, recorder: _Recorder, node: dict[str, Any]) -> None:
    if node["node-name"] in await block_nodes(monitor):
        return
    if node["driver"] != "file":
        await monitor.execute("blockdev-add", node)
        return
    path, write = recorder.paths[node["filename"]]
    number: int | None = None
    try:
        for access in (os.O_RDONLY, os.O_RDWR) if write else (os.O_RDONLY,):
            number = await hand_over(monitor, path, access, number, node["filename"])
        await monitor.execute("blockdev-add", {**node, "filename": f"/dev/fdset/{number}"})
    except BaseException:
        if number is not None and monitor.connected:
            with contextlib.suppress(QmpError, TimeLimitError):
                await asyncio.shield(monitor.remove_set(number))
        raise


async def unplug(
    monitor: Monitor, plan: MachinePlan, disk: PlanDisk, timeout: float = RELEASE_TIMEOUT
) -> None:
    """Asks the guest to let go of a disk, waits until it has, and closes its files. May be
    repeated.

    Raises:
        UnsupportedError: it cannot go while the guest runs.
        TimeLimitError: the guest does not let go; the disk stays. QmpError: QEMU refuses.
    """
    check_pluggable(plan, disk.bus, disk.unit)
    deadline = asyncio.get_running_loop().time() + timeout
    await _remove_device(monitor, f"disk{disk.unit}-dev", "the disk", timeout)
    while True:
        try:
            await _drop_nodes(monitor, disk)
        except QmpError as error:
            # QEMU lets go of what a device had (NVMe) some time after the device itself.
            if "in use" not in str(error) or asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(_POLL)
        else:
            return


async def _remove_device(monitor: Monitor, id: str, what: str, timeout: float) -> None:
    """Asks the guest to let go of a device, and waits until it has.

    Raises:
        TimeLimitError: it does not.
    """
    deadline = asyncio.get_running_loop().time() + timeout
    asked = False
    while id in await present(monitor):
        if not asked:
            await _ask_to_release(monitor, id)
            asked = True
        if asyncio.get_running_loop().time() > deadline:
            raise TimeLimitError(
                f"the guest of {monitor.name} did not let go of {what} within {timeout:g} s",
                action=f"let it finish booting and unmount {what} in the guest, then try again; "
                "or stop the VM first",
            )
        await asyncio.sleep(_POLL)


async def _ask_to_release(monitor: Monitor, id: str) -> None:
    try:
        await monitor.execute("device_del", {"id": id})
    except QmpError as error:
        if error.data.get("qmp_class") == "DeviceNotFound" or "already in the process" in str(
            error
        ):
            return  # it has gone just now, or was asked before
        raise


async def _drop_nodes(monitor: Monitor, disk: PlanDisk) -> None:
    """Closes what belongs to a disk that no device has any more."""
    await drop_nodes(monitor, [disk.node, *(layer.node for layer in disk.backing)])


async def plug_drive(monitor: Monitor, plan: MachinePlan, drive: PlanCdrom) -> None:
    """Gives the machine an empty CD-ROM drive. May be repeated.

    Raises:
        UnsupportedError: it cannot come while the guest runs.
        QmpError, TimeLimitError: it did not work.
    """
    _check_drive(plan, drive)
    devices = await present(monitor)
    if f"cd{drive.unit}-dev" in devices:
        return
    recorder = _Recorder(plan, Emulator(arch=plan.arch, path="", version=monitor.version))
    if "scsi" not in devices:
        scsi_controller().add_to(recorder)
    ScsiCdrom(msgspec.structs.replace(drive, path=None)).add_to(recorder)
    for command, arguments in recorder.steps:
        await monitor.execute(command, arguments)


async def unplug_drive(
    monitor: Monitor, plan: MachinePlan, drive: PlanCdrom, timeout: float = RELEASE_TIMEOUT
) -> None:
    """Empties a CD-ROM drive, and takes it away. May be repeated.

    Raises:
        UnsupportedError: it cannot go while the guest runs. InUseError: the guest has locked it.
        TimeLimitError: the guest does not let go of it. QmpError: QEMU refuses.
    """
    _check_drive(plan, drive)
    if f"cd{drive.unit}-dev" in await present(monitor):
        await change_medium(monitor, msgspec.structs.replace(drive, path=None))
    await _remove_device(monitor, f"cd{drive.unit}-dev", "the drive", timeout)


def _check_drive(plan: MachinePlan, drive: PlanCdrom) -> None:
    if drive.bus is DiskBus.SATA:
        raise UnsupportedError(
            "a CD-ROM drive on SATA comes and goes only while the VM is off",
            action="stop the VM first, or use --bus scsi",
        )
    check_pluggable(plan, drive.bus, drive.unit)


async def resize(monitor: Monitor, disk: PlanDisk, size: int) -> None:
    """Makes a disk larger, and tells the guest.

    Raises:
        UnsupportedError: QEMU's NVMe disks keep their size as long as they are there.
        QmpError, TimeLimitError: it did not work.
    """
    nodes = await block_nodes(monitor)
    if disk.node in nodes and nodes[disk.node]["image"]["virtual-size"] >= size:
        return
    if disk.bus is DiskBus.NVME:
        raise UnsupportedError(
            "an NVMe disk cannot grow while a running guest has it",
            action="detach it, make it larger, and attach it again; or stop the VM first",
        )
    await drop_useless(monitor, disk.node)  # QEMU would refuse
    await monitor.execute("block_resize", {"node-name": disk.node, "size": size})


async def limit(monitor: Monitor, device: str, limits: IOLimits) -> None:
    """Has a disk do no more than this from now on. The limits are the device's, not those of a
    node: they stay while layers come and go beneath it.

    Raises:
        QmpError, TimeLimitError: it did not work.
    """
    values = {
        "iops": limits.iops,
        "iops_rd": limits.read_iops,
        "iops_wr": limits.write_iops,
        "bps": limits.bandwidth,
        "bps_rd": limits.read_bandwidth,
        "bps_wr": limits.write_bandwidth,
    }
    # With virtio the disk is not the device that has the id, but a part of it.
    paths = [str(entry.get("qdev", "")) for entry in await monitor.execute("query-block")]
    path = next((path for path in paths if device in path.split("/")), None)
    if path is None:
        raise QmpError(f"QEMU of {monitor.name} has no {device}")
    arguments: dict[str, Any] = {"id": path, **values}
    if limits.burst:
        for name, value in values.items():
            if value:
                arguments[f"{name}_max"] = value * _BURST
                arguments[f"{name}_max_length"] = limits.burst
    await monitor.execute("block_set_io_throttle", arguments)
