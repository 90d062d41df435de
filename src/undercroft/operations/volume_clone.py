"""Volumes that begin as others, and volumes that cease to need others."""

from __future__ import annotations

import msgspec

from undercroft.model.base import Meta, Record, Ref
from undercroft.model.errors import AlreadyExistsError, InvalidError, StaleError
from undercroft.model.names import check_labels, check_name, new_id
from undercroft.model.requests import VolumeClone
from undercroft.model.snapshot import SnapshotSpec
from undercroft.model.task import Task
from undercroft.model.units import format_size
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeSpec, check_volume_size
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_queue,
    find,
    new_event,
    new_task,
    pending,
    scope,
)
from undercroft.operations.datastores import place, place_checks
from undercroft.operations.vm_power import check_present
from undercroft.operations.volume_use import already_exists, check_idle
from undercroft.store.interface import Check, Claim, Put, Transaction, Versioned


async def clone_volume(context: Context, caller: Caller, ref: str, request: VolumeClone) -> Task:
    """Writes a volume that is to begin as another, and the task that branches it off. That waits
    its turn among those of the VM that has the source, or of the source itself. With ``full`` a
    second task, the one that is returned, then has the new one take over all beneath it.

    Raises:
        InvalidError: the name or the size makes no sense.
        NotFoundError: no such volume. WrongStateError, BusyError: it cannot be cloned now.
        AlreadyExistsError: the name is taken.
    """
    caller.require("volume.create")
    check_name(request.name, "volume")
    check_labels(request.labels)
    for _ in range(ATTEMPTS):
        found = await find(context.store, Volume, ref)
        source = found.record
        check_idle(source)
        where = await place(context, request.datastore)
        encrypted = source.spec.encrypted if request.encrypted is None else request.encrypted
        if source.spec.encrypted and not encrypted and not request.full:
            raise linked_is_encrypted(source)
        size = check_volume_size(request.size or source.spec.size)
        if size < source.spec.size:
            raise InvalidError(
                f"a clone of {format_size(size)} is smaller than {source.label} "
                f"with {format_size(source.spec.size)}",
                object=source.label,
                action="leave the size out, or choose a larger one",
            )
        volume = Volume(
            meta=Meta(
                id=new_id("volume"),
                name=request.name,
                created=context.clock(),
                labels=request.labels,
            ),
            spec=VolumeSpec(
                size=size,
                image=None if request.full else source.spec.image,
                host=source.spec.host,
                source=source.meta.id,
                datastore=where.record.meta.id if where else None,
                encrypted=encrypted,
            ),
        )
        told = f"{volume.label} is to be a clone of {source.label}"
        event = new_event(context.clock(), "volume.created", volume, told, by=caller.name)
        checks, puts, task = await _queued(
            context,
            caller,
            found,
            "volume.clone",
            about=Ref.to(volume),
            volume=source.meta.id,
            clone=volume.meta.id,
            snapshot=new_id("snapshot"),
            name=f"clone-{volume.meta.id}",
            spec=msgspec.to_builtins(SnapshotSpec(vm=source.spec.user or "", passing=True)),
        )
        if request.full:
            task = new_task(context, "volume.flatten", volume, caller.name)
            volume = msgspec.structs.replace(volume, tasks=(task.meta.id,))
            puts.append(Put(task))
        try:
            await context.store.transact(
                Transaction(
                    checks=[*checks, *place_checks(where)],
                    claims=[Claim(scope("volume"), request.name, volume.meta.id)],
                    puts=[*puts, Put(volume), Put(event)],
                )
            )
        except StaleError:
            continue
        except AlreadyExistsError:
            raise already_exists(request.name) from None
        return task
    raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")


def linked_is_encrypted(source: Record) -> InvalidError:
    """What lies on encrypted layers is encrypted, too."""
    return InvalidError(
        f"a linked clone of {source.label}, which is encrypted, is encrypted, too",
        object=source.label,
        action="make a full one: --full --decrypt",
    )


async def flatten_volume(context: Context, caller: Caller, ref: str) -> Task:
    """Writes the task that has a volume take over all that it lies on.

    Raises:
        WrongStateError, BusyError: it cannot be done now.
    """
    caller.require("volume.change")
    for _ in range(ATTEMPTS):
        found = await find(context.store, Volume, ref)
        same = await pending(context.store, found.record, ("volume.flatten",))
        if same is not None:
            return same
        check_idle(found.record)
        checks, puts, task = await _queued(
            context, caller, found, "volume.flatten", volume=found.record.meta.id
        )
        try:
            await context.store.transact(Transaction(checks=checks, puts=puts))
        except StaleError:
            continue
        return task
    raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")


async def _queued(
    context: Context,
    caller: Caller,
    found: Versioned[Volume],
    verb: str,
    about: Ref | None = None,
    **arguments: object,
) -> tuple[list[Check], list[Put], Task]:
    """A task on a volume: in the queue of the VM that has it, as only what is done for that VM
    knows whether it runs, or else in the volume's own."""
    volume = found.record
    checks = [Check(Volume, volume.meta.id, found.revision)]
    task = new_task(context, verb, about or volume, caller.name, **arguments)
    if volume.spec.user is None:
        wanted = msgspec.structs.replace(volume, tasks=(*volume.tasks, task.meta.id))
        return checks, [Put(wanted), Put(task)], task
    owner = await find(context.store, VM, volume.spec.user)
    vm = owner.record
    check_present(vm)
    check_queue(vm)
    checks.append(Check(VM, vm.meta.id, owner.revision))
    queue = msgspec.structs.replace(vm, tasks=(*vm.tasks, task.meta.id))
    return checks, [Put(queue), Put(task)], task
