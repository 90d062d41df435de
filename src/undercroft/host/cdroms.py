"""How an actor gives its VM CD-ROM drives, and puts discs into them and takes them out.

The VM's record says what is in a drive: it changes together with the outcome of the task. Until
then the task says what is under way, and whoever repeats it finds out from QEMU how far it got.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.disks import check_not_suspended, unless_it_ended
from undercroft.host.outcome import TaskRun, change_spec
from undercroft.host.planning import plan_cdrom
from undercroft.hypervisor.medium import check_medium
from undercroft.model.checks import check_vm_spec
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import VM, Cdrom, DiskBus
from undercroft.operations.cdroms import find_drive

Drives = tuple[Cdrom, ...]


async def insert(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Puts a disc into a drive, in place of what is in it."""
    return await _exchange(actor, vm, run, str(run.arguments["path"]))


async def eject(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Takes the disc out of a drive."""
    return await _exchange(actor, vm, run, None)


async def _exchange(actor: VMActor, vm: VM, run: TaskRun, medium: str | None) -> Outcome:
    unit, force = int(run.arguments["drive"]), bool(run.arguments.get("force"))
    await run.commit()
    known = find_drive(vm, unit)
    drive = msgspec.structs.replace(known, medium=medium)
    if actor.machine is not None:
        planned = plan_cdrom(drive, _node(drive, run))
        async with _unless_it_ended(actor, vm):
            await actor.machine.change_medium(planned, force=force)
    else:
        if medium is not None:
            await asyncio.to_thread(check_medium, medium)
        if medium is not None or not force:
            check_not_suspended(actor, vm)

    def change(drives: Drives) -> Drives:
        return tuple(drive if known.unit == unit else known for known in drives)

    went = "taken out of" if medium is None else "put into"
    return Outcome(
        lambda record: _with_drives(record, change),
        event="cdrom.ejected" if medium is None else "cdrom.inserted",
        message=f"{medium or known.medium or 'nothing'} was {went} drive {unit} of {vm.label}",
        result={"drive": unit},
    )


async def add(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Gives the VM one more drive."""
    await run.commit()
    path = run.arguments.get("path")
    drive = Cdrom(
        bus=DiskBus(run.arguments["bus"]),
        medium=str(path) if path is not None else None,
        unit=int(run.arguments["drive"]),
    )
    check_vm_spec(msgspec.structs.replace(vm.spec, cdroms=_added(vm.spec.cdroms, drive)))
    if actor.machine is not None:
        async with _unless_it_ended(actor, vm):
            await actor.machine.add_drive(plan_cdrom(drive, _node(drive, run)))
    else:
        if drive.medium is not None:
            await asyncio.to_thread(check_medium, drive.medium)
        check_not_suspended(actor, vm)
    return Outcome(
        lambda record: _with_drives(record, lambda drives: _added(drives, drive)),
        event="cdrom.added",
        message=f"{vm.label} has CD-ROM drive {drive.unit} now",
        result={"drive": drive.unit},
    )


async def remove(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Takes a drive away from the VM, with what is in it."""
    unit = int(run.arguments["drive"])
    await run.commit()
    known = next((drive for drive in vm.spec.cdroms if drive.unit == unit), None)
    if actor.machine is None:
        check_not_suspended(actor, vm)
    elif known is not None:
        async with _unless_it_ended(actor, vm):
            await actor.machine.remove_drive(plan_cdrom(known))
    return Outcome(
        lambda record: _with_drives(
            record, lambda drives: tuple(drive for drive in drives if drive.unit != unit)
        ),
        event="cdrom.removed",
        message=f"{vm.label} has no CD-ROM drive {unit} any more",
        result={"drive": unit},
    )


def _added(drives: Drives, drive: Cdrom) -> Drives:
    others = (known for known in drives if known.unit != drive.unit)
    return tuple(sorted((*others, drive), key=lambda known: known.unit))


def _node(drive: Cdrom, run: TaskRun) -> str:
    """A name that says which task it was, so that the next daemon knows whether it is done."""
    return f"cd{drive.unit}-{run.id.removeprefix('task-')}"


@asynccontextmanager
async def _unless_it_ended(actor: VMActor, vm: VM) -> AsyncIterator[None]:
    async with unless_it_ended(actor, vm):
        try:
            yield
        except UndercroftError as error:
            error.object = error.object or vm.label
            raise


def _with_drives(vm: VM, change: Callable[[Drives], Drives]) -> VM:
    drives = change(vm.spec.cdroms)
    if drives == vm.spec.cdroms:
        return vm
    meta = msgspec.structs.replace(vm.meta, generation=vm.meta.generation + 1)
    return change_spec(msgspec.structs.replace(vm, meta=meta), cdroms=drives)
