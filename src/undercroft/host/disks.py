"""How an actor gives its VM disks, takes them away, makes them larger and limits them.

The VM's record says what it has: it changes together with the outcome of the task. Until then
the task says what is under way, and whoever repeats it finds out from QEMU how far it got.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.attachments import disk_of, free_volume, grow
from undercroft.host.environment import Environment
from undercroft.host.heads import own_head
from undercroft.host.outcome import TaskRun, change_spec
from undercroft.host.planning import plan_disk
from undercroft.model.errors import (
    DataError,
    QmpError,
    TimeLimitError,
    UnsupportedError,
    WrongStateError,
)
from undercroft.model.units import format_size
from undercroft.model.vm import VM, Disk, DiskBus, disk_units
from undercroft.model.volume import Volume

END_PATIENCE = 5.0  # seconds for a QEMU whose monitor is gone to end


async def attach(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Gives the VM a volume."""
    environment = actor.environment
    await run.commit()
    volume = await _volume(environment, run)
    disk = Disk(
        volume=volume.meta.id,
        bus=DiskBus(run.arguments["bus"]),
        read_only=bool(run.arguments["read_only"]),
        unit=int(run.arguments["unit"]),
    )
    check_not_suspended(actor, vm)
    machine = actor.machine
    if not disk.read_only:
        await own_head(environment, volume.meta.id)
        volume = await _volume(environment, run)
    if machine is not None:
        planned = await plan_disk(environment, volume, disk, disk.unit)
        async with unless_it_ended(actor, vm):
            await machine.attach(planned)
            actor.guard()

    def change(record: VM) -> VM:
        if any(known.volume == disk.volume for known in record.spec.disks):
            return record
        return _with_disks(record, (*_placed(record), disk))

    return Outcome(
        change,
        event="volume.attached",
        message=f"{volume.label} was attached to {vm.label}",
        result={"volume": volume.meta.id},
    )


async def detach(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Takes a volume away from the VM; a running guest is asked to let go of it first."""
    environment = actor.environment
    await run.commit()
    volume = await _volume(environment, run)
    check_not_suspended(actor, vm)
    machine, found = actor.machine, disk_of(vm, volume.meta.id)
    if machine is not None and found is not None:
        disk, unit = found
        planned = await plan_disk(environment, volume, disk, unit)
        await run.progress(None, "waiting for the guest to let go of the disk")
        async with unless_it_ended(actor, vm):
            await machine.release(planned)
    await free_volume(environment, volume.meta.id, vm.meta.id)

    def change(record: VM) -> VM:
        left = tuple(disk for disk in _placed(record) if disk.volume != volume.meta.id)
        return _with_disks(record, left)

    return Outcome(
        change,
        event="volume.detached",
        message=f"{volume.label} was detached from {vm.label}",
        result={"volume": volume.meta.id},
    )


async def resize(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes a volume of the VM's larger."""
    environment = actor.environment
    await run.commit()
    volume = await _volume(environment, run)
    check_not_suspended(actor, vm)
    size = int(run.arguments["size"])
    machine, found = actor.machine, disk_of(vm, volume.meta.id)
    grown = False
    if machine is not None and found is not None:
        disk, unit = found
        if disk.read_only:
            raise WrongStateError(
                f"{volume.label} is attached for reading only, so it keeps its size",
                object=volume.label,
                action="stop the VM first, or detach the volume",
            )
        planned = await plan_disk(environment, volume, disk, unit)
        async with unless_it_ended(actor, vm):
            await machine.resize(planned, size)
            grown = True
    await grow(environment, volume, size, file=not grown)
    return Outcome(
        lambda record: record,
        event="volume.resized",
        message=f"{volume.label} has {format_size(size)} now",
        result={"volume": volume.meta.id, "size": size},
    )


async def limit(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Has a running guest keep to the limits of a volume."""
    volume = await _volume(actor.environment, run)
    machine, found = actor.machine, disk_of(vm, volume.meta.id)
    if machine is not None and found is not None:
        async with unless_it_ended(actor, vm):
            await machine.limit(found[1], volume.spec.limits)
    return Outcome(
        lambda record: record,
        event="volume.limited",
        message=f"{volume.label} has new limits",
        result={"volume": volume.meta.id},
    )


async def _volume(environment: Environment, run: TaskRun) -> Volume:
    id = str(run.arguments["volume"])
    found = await environment.store.get(Volume, id)
    if found is None:
        raise DataError(f"volume {id} is gone", object=f"volume {id}")
    return found.record


def _placed(vm: VM) -> tuple[Disk, ...]:
    """The disks of a VM with their places, which stay when another one goes."""
    units = disk_units(vm.spec.disks)
    return tuple(
        msgspec.structs.replace(disk, unit=unit)
        for disk, unit in zip(vm.spec.disks, units, strict=True)
    )


def _with_disks(vm: VM, disks: tuple[Disk, ...]) -> VM:
    if disks == vm.spec.disks:
        return vm
    meta = msgspec.structs.replace(vm.meta, generation=vm.meta.generation + 1)
    return change_spec(msgspec.structs.replace(vm, meta=meta), disks=disks)


def check_not_suspended(actor: VMActor, vm: VM) -> None:
    """Does nothing unless the VM is suspended.

    Raises:
        WrongStateError: it is.
    """
    if actor.machine is None and actor.environment.suspended_path(vm.meta.id).exists():
        raise WrongStateError(
            f"{vm.label} is suspended: what it has in memory knows its disks as they are",
            object=vm.label,
            action=f"let it go on first: croft resume {vm.meta.name}",
        )


@asynccontextmanager
async def unless_it_ended(actor: VMActor, vm: VM) -> AsyncIterator[None]:
    """What QEMU does not do because it has ended does not matter: the next one begins with what
    the record says.

    Raises:
        UndercroftError: it runs, and did not do it.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename}: {error.strerror}", object=vm.label) from error
    except UnsupportedError as error:
        error.object = error.object or vm.label
        raise
    except TimeLimitError:
        raise
    except (QmpError, WrongStateError) as error:  # the latter where it had ended before
        if "qmp_class" in error.data or await actor.exited(END_PATIENCE) is None:
            raise
