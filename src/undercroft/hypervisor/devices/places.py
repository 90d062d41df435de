"""Where each disk of a machine goes, and on which controller."""

from __future__ import annotations

from collections.abc import Iterator

from undercroft.hypervisor.devices.base import SCSI_PORT, Device, disk_slot, in_port
from undercroft.hypervisor.devices.cdrom import SataCdrom, ScsiCdrom
from undercroft.hypervisor.devices.disk import (
    NvmeDisk,
    SataDisk,
    ScsiController,
    ScsiDisk,
    VirtioDisk,
)
from undercroft.hypervisor.line import Slot
from undercroft.hypervisor.plan import MachinePlan, PlanDisk, unit_of
from undercroft.model.vm import DiskBus

__all__ = ["SATA_PORTS", "hot_disk", "place_cdroms", "place_disks", "scsi_controller"]

SATA_PORTS = 6


def place_disks(plan: MachinePlan) -> Iterator[Device]:
    """All disks of a plan, with the SCSI controller that some hang on."""
    if plan.hot_ports:
        if plan.scsi or DiskBus.SCSI in plan.buses:
            yield scsi_controller()
        sata = 0
        for index, disk in enumerate(plan.disks):
            if disk.bus is DiskBus.SATA:
                yield SataDisk(disk, unit_of(disk, index), sata)
                sata += 1
            else:
                yield hot_disk(disk, unit_of(disk, index))
    else:
        yield from _place_on_bus(plan)


def place_cdroms(plan: MachinePlan) -> Iterator[Device]:
    """The CD-ROM drives of a plan; those on SATA begin with the last port, as disks do with the
    first."""
    port = SATA_PORTS
    for drive in plan.cdroms:
        if drive.bus is DiskBus.SCSI:
            yield ScsiCdrom(drive)
        else:
            port -= 1
            yield SataCdrom(drive, port)


def scsi_controller() -> ScsiController:
    """The controller, in its port."""
    return ScsiController(in_port(SCSI_PORT))


def hot_disk(disk: PlanDisk, unit: int) -> Device:
    """A disk in a machine with ports: unit 0 on the root bus, where firmware finds it first, any
    other behind the port that is its own, or on the SCSI controller."""
    if disk.bus is DiskBus.SCSI:
        return ScsiDisk(disk, unit, unit)
    slot = in_port(unit - 1) if unit else disk_slot(0, 1)
    return (NvmeDisk if disk.bus is DiskBus.NVME else VirtioDisk)(disk, unit, slot)


def _place_on_bus(plan: MachinePlan) -> Iterator[Device]:
    """All on the root bus, in their order: on boards without ports, and in machines whose saved
    state is from before there were any. The SCSI controller is at the place of the first."""
    buses = [disk.bus for disk in plan.disks]
    on_bus = buses.count(DiskBus.VIRTIO) + buses.count(DiskBus.NVME)
    on_bus += DiskBus.SCSI in plan.buses
    slots: Iterator[Slot] = iter([disk_slot(number, on_bus) for number in range(on_bus)])
    scsi = sata = 0
    for index, disk in enumerate(plan.disks):
        unit = unit_of(disk, index)
        if disk.bus is DiskBus.VIRTIO:
            yield VirtioDisk(disk, unit, next(slots))
        elif disk.bus is DiskBus.NVME:
            yield NvmeDisk(disk, unit, next(slots))
        elif disk.bus is DiskBus.SCSI:
            if scsi == 0:
                yield ScsiController(next(slots))
            yield ScsiDisk(disk, unit, scsi)
            scsi += 1
        else:
            yield SataDisk(disk, unit, sata)
            sata += 1
    if scsi == 0 and DiskBus.SCSI in plan.buses:
        yield ScsiController(next(slots))
