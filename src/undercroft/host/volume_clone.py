"""How a volume branches off from another, which may be in use, and ceases to need it."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.datastores import driver, file_name, layer_file
from undercroft.host.environment import Environment
from undercroft.host.forgetting import forget
from undercroft.host.imaging import reported
from undercroft.host.layers import (
    collect_layers,
    get_layer,
    head_layer,
    layer_files,
    make_layer,
    new_layer,
    volume_status,
)
from undercroft.host.merging import flatten_disk
from undercroft.host.outcome import TaskRun, change_status, finish
from undercroft.host.snapshots import taken
from undercroft.model.errors import DataError, UndercroftError
from undercroft.model.layer import Layer, LayerFormat, LayerState
from undercroft.model.names import new_id
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.context import scope
from undercroft.storage.formats.empty import empty_size
from undercroft.store.interface import Check, Delete, Put, Release, Transaction, update

if TYPE_CHECKING:
    from undercroft.store.interface import Versioned

FLATTENED = "layer"  # where a task's checkpoint has the id of the layer that it makes


async def _get(environment: Environment, id: str) -> Versioned[Volume]:
    found = await environment.store.get(Volume, id)
    if found is None:
        raise DataError(f"volume {id} is gone", object=f"volume {id}")
    return found


# -- branching off --------------------------------------------------------------------------


async def branch_off(environment: Environment, source: Volume, clone: str) -> Volume:
    """Gives a clone its first layer, over what a volume that nobody uses has now; how the clone is
    to be written down.

    Raises:
        UndercroftError: it did not work, and can be tried again.
    """
    head = await get_layer(environment, source.status.head)
    made = await _get(environment, clone)
    if made.record.status.head:  # a daemon died after that
        await make_layer(environment, head.meta.id)
        await make_layer(environment, made.record.status.head)
        return volume_status(made.record, state=VolumeState.READY)
    found = await _get(environment, source.meta.id)
    puts: list[Put] = []
    spec = made.record.spec
    on: Layer | None = head
    image = None
    if await _untouched(environment, head):  # nothing is in it yet
        below = head.spec.parent
        on = await get_layer(environment, below) if below is not None else None
        image = head.spec.image
    else:
        following = new_layer(environment, source.spec.size, parent=head)
        puts += [Put(following), Put(volume_status(found.record, head=following.meta.id))]
    layer = new_layer(
        environment,
        spec.size,
        parent=on,
        image=image,
        datastore=spec.datastore or head.spec.datastore,
        encrypted=spec.encrypted or head.spec.encrypted,
    )
    branched = volume_status(made.record, head=layer.meta.id)
    await environment.store.transact(
        Transaction(
            checks=[
                Check(Volume, source.meta.id, found.revision),
                Check(Volume, clone, made.revision),
            ],
            puts=[*puts, Put(layer), Put(branched)],
        )
    )
    for put in puts[:1]:
        await make_layer(environment, put.record.meta.id)
    await make_layer(environment, layer.meta.id)
    return volume_status(branched, state=VolumeState.READY)


async def _untouched(environment: Environment, head: Layer) -> bool:
    """Whether nothing has been written to a layer that lies on another."""
    if head.spec.whole or (head.spec.parent is None and head.spec.image is None):
        return False
    path = await layer_file(environment, head)
    try:
        length = (await asyncio.to_thread(path.stat)).st_size
    except FileNotFoundError:
        return False
    return length == empty_size(head.spec.size, encrypted=head.spec.encrypted)


async def clone_attached(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Branches a clone off from a disk of a VM, which goes on."""
    environment = actor.environment
    clone = str(run.arguments["clone"])
    await run.commit()
    try:
        made = (await _get(environment, clone)).record
        if not made.status.head:
            snapshot = await taken(actor, vm, run)
            volume = str(run.arguments["volume"])
            below = next(d.layer for d in snapshot.status.disks if d.volume == volume)
            found = await _get(environment, clone)
            layer = new_layer(
                environment,
                found.record.spec.size,
                parent=await get_layer(environment, below),
                datastore=found.record.spec.datastore,
                encrypted=found.record.spec.encrypted or None,
            )
            made = volume_status(found.record, head=layer.meta.id)
            await environment.store.transact(
                Transaction(
                    checks=[Check(Volume, clone, found.revision)], puts=[Put(layer), Put(made)]
                )
            )
            await forget(environment, snapshot)
        await make_layer(environment, made.status.head)
    except UndercroftError:
        await abandon(environment, clone)
        raise

    def change(record: VM) -> VM:
        if actor.machine is None:  # it is off, or its end is still to be seen to
            return record
        return change_status(record, state=actor.present_state(record))

    return Outcome(
        change,
        event="volume.cloned",
        message=f"{made.label} was cloned from a disk of {vm.label}",
        result={"volume": clone},
        extra=lambda record: ([Put(volume_status(made, state=VolumeState.READY))], [], []),
    )


async def abandon(environment: Environment, clone: str) -> None:
    """Removes a clone that did not come about, and ends what waits for it."""

    def extra(record: Volume) -> tuple[list[Put], list[Delete], list[Release]]:
        return [], [], [Release(scope("volume"), record.meta.name, record.meta.id)]

    await update(environment.store, Volume, clone, lambda v: volume_status(v, head=""))
    await finish(environment, Volume, clone, "", change=lambda v: None, extra=extra)
    await collect_layers(environment)


async def collect_clones(environment: Environment) -> None:
    """Removes the clones that nobody makes any more."""
    waiting = [
        item.record
        for item in (await environment.store.list(Volume)).items
        if item.record.status.state is VolumeState.PENDING and item.record.spec.source
    ]
    if not waiting:
        return
    wanted = {
        str(item.record.spec.arguments.get("clone"))
        for item in (await environment.store.list(Task)).items
        if not item.record.status.state.final
    }
    for volume in waiting:
        if volume.meta.id not in wanted:
            await abandon(environment, volume.meta.id)


# -- needing nothing of others --------------------------------------------------------------


async def flatten_attached(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Has a disk of a VM take over all that it lies on; the guest goes on meanwhile."""
    environment = actor.environment
    id = str(run.arguments["volume"])
    found = await _get(environment, id)
    await flatten_disk(actor, vm, run, id)
    await update(environment.store, Volume, id, _alone)
    return Outcome(
        lambda record: record,
        event="volume.flattened",
        message=f"{found.record.label} needs nothing of others any more",
        result={"volume": id},
    )


async def flatten(environment: Environment, volume: Volume, run: TaskRun) -> Volume:
    """Copies all that a volume, which nobody uses, has and lies on into one new layer; how the
    volume is to be written down.

    Raises:
        UndercroftError: it did not work. All is as it was.
    """
    head = await get_layer(environment, await head_layer(environment, volume.meta.id))
    if head.spec.parent is None and head.spec.image is None:
        return _alone(volume_status(volume, head=head.meta.id))
    id = run.task.status.checkpoint.get(FLATTENED)
    if id is None:
        id = new_id("layer")
        await run.checkpoint(**{FLATTENED: id})
    layer = new_layer(
        environment,
        volume.spec.size,
        datastore=head.spec.datastore,
        encrypted=volume.spec.encrypted,
    )
    layer = msgspec.structs.replace(layer, meta=msgspec.structs.replace(layer.meta, id=id, name=id))
    store = await driver(environment, layer.spec.datastore)
    name = file_name(layer)
    await store.remove(name)  # a daemon died over it
    files = await layer_files(environment, head.meta.id)
    whole = await _only(environment, head, layer)
    key: Path | None = None
    if layer.spec.encrypted:
        if whole is not None:
            await asyncio.to_thread(environment.keys.copy, whole.meta.id, id)
        key = await asyncio.to_thread(environment.keys.make, id)
    async with reported(run) as report:
        await store.copy(
            files if whole is None else files[1:],
            name,
            volume.spec.size,
            whole=whole is not None,
            key=key,
            progress=lambda done: report(done, "copying the disk"),
        )
    status = msgspec.structs.replace(layer.status, state=LayerState.READY)
    ready = msgspec.structs.replace(layer, status=status)
    change = partial(volume_status, head=id)
    found = await _get(environment, volume.meta.id)
    wanted = _alone(change(found.record))
    try:
        await environment.store.transact(
            Transaction(
                checks=[Check(Volume, volume.meta.id, found.revision)],
                puts=[Put(ready), Put(wanted)],
            )
        )
    except BaseException:
        await store.remove(name)
        raise
    await collect_layers(environment)
    return wanted


async def _only(environment: Environment, head: Layer, layer: Layer) -> Layer | None:
    """The one layer that has all that a chain shows, if its file can be copied as it is."""
    if head.spec.parent is None or not await _untouched(environment, head):
        return None
    bottom = await get_layer(environment, head.spec.parent)
    spec = bottom.spec
    alike = (spec.size, spec.encrypted) == (layer.spec.size, layer.spec.encrypted)
    lowest = spec.parent is None and spec.image is None and spec.format is LayerFormat.QCOW2
    return bottom if alike and lowest and not spec.preallocated else None


def _alone(volume: Volume) -> Volume:
    spec = msgspec.structs.replace(volume.spec, image=None)
    return msgspec.structs.replace(volume, spec=spec)
