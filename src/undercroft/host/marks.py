"""Which checkpoints of a VM are kept track of, and in which layers their marks begin.

A checkpoint's mark is a dirty bitmap of its id, in each layer that was written to since. All of
them together tell what has changed. It begins in the layer that the checkpoint's record names;
where one is missing or was lost in between, nothing can be told.
"""

from __future__ import annotations

from functools import partial

import msgspec

from undercroft.host.environment import Environment
from undercroft.host.layers import chain
from undercroft.model.checkpoint import Checkpoint, CheckpointDisk
from undercroft.store.interface import update


async def checkpoints_of(environment: Environment, vm: str) -> list[Checkpoint]:
    """The checkpoints of a VM (an id), oldest first."""
    listing = await environment.store.list(Checkpoint)
    found = [item.record for item in listing.items if item.record.spec.vm == vm]
    return sorted(found, key=lambda c: (c.meta.created, c.meta.id))


async def marks_of(environment: Environment, vm: str) -> list[str]:
    """What is kept track of in the disks of a VM."""
    return [checkpoint.meta.id for checkpoint in await checkpoints_of(environment, vm)]


async def begun_with(environment: Environment, vm: str, layer: str) -> list[str]:
    """The marks of a VM that begin with a layer."""
    return [
        checkpoint.meta.id
        for checkpoint in await checkpoints_of(environment, vm)
        if any(disk.next == layer for disk in checkpoint.status.disks)
    ]


async def marks_moved(environment: Environment, old: str, new: str) -> None:
    """Writes that marks which began with a layer now begin with another."""
    for item in (await environment.store.list(Checkpoint)).items:
        if any(disk.next == old for disk in item.record.status.disks):
            change = partial(_moved, old, new)
            await update(environment.store, Checkpoint, item.record.meta.id, change)


def _moved(old: str, new: str, checkpoint: Checkpoint) -> Checkpoint:
    disks = tuple(
        msgspec.structs.replace(disk, next=new) if disk.next == old else disk
        for disk in checkpoint.status.disks
    )
    status = msgspec.structs.replace(checkpoint.status, disks=disks)
    return msgspec.structs.replace(checkpoint, status=status)


async def marked_layers(
    environment: Environment, disk: CheckpointDisk, since: Checkpoint
) -> int | None:
    """Of how many layers, from the top of a disk at a checkpoint down, the marks of an earlier one
    have to be put together; None: that one is not of this disk's past."""
    before = next((one for one in since.status.disks if one.volume == disk.volume), None)
    if before is None:
        return None
    if before.read_only and disk.read_only:
        return 0 if before.layer == disk.layer else None
    layers = [layer.meta.id for layer in await chain(environment, disk.layer)]
    return layers.index(before.next) + 1 if before.next in layers else None
