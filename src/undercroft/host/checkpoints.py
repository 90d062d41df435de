"""How an actor makes a checkpoint of its VM, and lets one go.

A checkpoint begins as a snapshot that nobody is shown. The new layers have its mark from their
first moment on, so nothing that is written is missed, whatever is killed.
"""

from __future__ import annotations

import msgspec
import structlog

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.folding import fold_layers
from undercroft.host.forgetting import forget
from undercroft.host.layers import collect_layers, get_layer
from undercroft.host.merging import merge_layers
from undercroft.host.outcome import TaskRun, change_status
from undercroft.host.snapshots import taken
from undercroft.model.base import Meta
from undercroft.model.checkpoint import (
    Checkpoint,
    CheckpointDisk,
    CheckpointSpec,
    CheckpointState,
    CheckpointStatus,
)
from undercroft.model.errors import UndercroftError
from undercroft.model.snapshot import Snapshot
from undercroft.model.vm import VM
from undercroft.store.interface import Delete, Put, Transaction, update

log = structlog.get_logger(__name__)


async def create(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Keeps what all disks hold at this moment, and has marked what is written from now on."""
    environment = actor.environment
    await run.commit()
    done = await taken(actor, vm, run)
    disks = []
    shape = done.status.shape or vm.spec
    for disk, spec in zip(done.status.disks, shape.disks, strict=True):
        size = (await get_layer(environment, disk.layer)).spec.size
        disks.append(
            CheckpointDisk(
                volume=disk.volume,
                size=size,
                layer=disk.layer,
                next=disk.next,
                read_only=spec.read_only,
            )
        )
    id = str(run.arguments["checkpoint"])
    checkpoint = Checkpoint(
        meta=Meta(id=id, name=id, project=vm.meta.project, created=done.meta.created),
        spec=CheckpointSpec(
            vm=vm.meta.id,
            quiesce=done.spec.quiesce,
            owner=str(run.arguments.get("owner", "")),
        ),
        status=CheckpointStatus(
            snapshot=done.meta.id,
            disks=tuple(disks),
            shape=done.status.shape,
            running=done.status.running,
            quiesced=done.status.quiesced,
        ),
    )

    def change(record: VM) -> VM:
        if actor.machine is None:
            return record
        return change_status(record, state=actor.present_state(record))

    return Outcome(
        change,
        result={"checkpoint": id},
        extra=lambda record: ([Put(checkpoint), Put(done)], [], []),
    )


async def release(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Lets the content of a checkpoint go, and puts the layers together that were kept apart for
    it. With ``remove`` among the arguments what changes is not marked any more either."""
    environment = actor.environment
    await run.commit()
    id = str(run.arguments["checkpoint"])
    found = await environment.store.get(Checkpoint, id)
    snapshot = found.record.status.snapshot if found is not None else None
    if snapshot is None:  # a daemon died after that was written
        held = run.task.status.checkpoint.get("snapshot")
        snapshot = str(held) if held else None
    else:
        await run.checkpoint(snapshot=snapshot)
    if run.arguments.get("remove"):
        await environment.store.transact(Transaction(deletes=[Delete(Checkpoint, id)]))
    elif found is not None:
        await update(environment.store, Checkpoint, id, _released)
    if snapshot is not None:
        kept = await environment.store.get(Snapshot, snapshot)
        if kept is not None:
            await forget(environment, kept.record)
    await collect_layers(environment)
    try:
        await fold_layers(actor, vm, run)
        await merge_layers(actor, vm, run, raw=False)
    except (UndercroftError, OSError) as error:  # its content is let go all the same
        log.warning("layers were not merged", vm=vm.meta.name, error=str(error))
    return Outcome(lambda record: record)


def _released(checkpoint: Checkpoint) -> Checkpoint:
    status = msgspec.structs.replace(
        checkpoint.status, state=CheckpointState.RELEASED, snapshot=None
    )
    return msgspec.structs.replace(checkpoint, status=status)
