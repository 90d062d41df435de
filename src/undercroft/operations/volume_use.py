"""Who uses a volume, and whether it can be taken into use."""

from __future__ import annotations

from collections.abc import Sequence

from undercroft.model.errors import AlreadyExistsError, BusyError, WrongStateError
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.context import Context

_CHANGES = (
    "volume.attach",
    "volume.detach",
    "cdrom.add",
    "cdrom.remove",
    "cdrom.insert",
    "cdrom.eject",
)


async def users_of(context: Context, volume: Volume) -> list[VM | Snapshot]:
    """The VMs that have a volume, and the snapshots that need it to be gone back to."""
    id = volume.meta.id
    users: list[VM | Snapshot] = [
        item.record
        for item in (await context.store.list(VM)).items
        if item.record.meta.id in (volume.spec.vm, volume.spec.attached)
        or any(disk.volume == id for disk in item.record.spec.disks)
    ]
    users += [
        item.record
        for item in (await context.store.list(Snapshot)).items
        if any(disk.volume == id for disk in item.record.status.disks)
    ]
    return users


def check_idle(volume: Volume) -> None:
    """Does nothing if a volume is there and nothing is being done with it. Whoever takes one into
    use checks so, in the transaction that writes it down.

    Raises:
        WrongStateError: it is just being made or removed. BusyError: a task has it.
    """
    if volume.status.state in (VolumeState.PENDING, VolumeState.REMOVING):
        doing = "made" if volume.status.state is VolumeState.PENDING else "removed"
        raise WrongStateError(
            f"{volume.label} is just being {doing}",
            object=volume.label,
            action="wait for it: croft task ls",
            state=volume.status.state,
        )
    if volume.tasks:
        raise BusyError(
            f"something is being done with {volume.label}",
            object=volume.label,
            action="wait for it: croft task ls",
            tasks=volume.tasks,
        )


async def check_settled(context: Context, vm: VM) -> None:
    """Does nothing if no disk or disc of a VM is still to come or to go. What is written down for
    all that it has now would not be for what it has then.

    Raises:
        BusyError: one is.
    """
    busy = await waiting(context, vm, _CHANGES)
    if busy:
        raise BusyError(
            f"a disk or disc of {vm.label} is just being changed",
            object=vm.label,
            action="wait for it: croft task ls",
            tasks=busy,
        )


async def waiting(context: Context, vm: VM, verbs: Sequence[str]) -> list[str]:
    """The tasks (ids) of a VM that are one of these verbs and not done yet."""
    found = []
    for id in vm.tasks:
        task = await context.store.get(Task, id)
        if task is not None and task.record.spec.verb in verbs:
            found.append(id)
    return found


def already_exists(name: str) -> AlreadyExistsError:
    """The error for a name that another volume has."""
    return AlreadyExistsError(
        f"volume {name} already exists",
        object=f"volume {name}",
        action="choose another name",
    )
