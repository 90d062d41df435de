"""What a volume writes to must be its own.

What a VM has for reading only gets no new layer when the VM is snapshotted, cloned or backed up: it
is not written to. It may be taken away and given to somebody who does.
"""

from __future__ import annotations

import contextlib
from functools import partial

import msgspec

from undercroft.host.environment import Environment
from undercroft.host.layers import (
    Uses,
    collect_layers,
    get_layer,
    head_layer,
    make_layer,
    new_layer,
    volume_status,
)
from undercroft.model.checkpoint import Checkpoint
from undercroft.model.volume import Volume
from undercroft.store.interface import Check, Put, Transaction, update


async def own_head(environment: Environment, volume: str) -> None:
    """Gives a volume that is about to be written to, and that no QEMU has yet, a layer of its own,
    if anybody else needs what it has now as it is.

    Raises:
        UndercroftError: it did not work. All is as it was.
    """
    await _not_unchanged(environment, volume)
    head = await get_layer(environment, await head_layer(environment, volume))
    uses = await Uses.read(environment)
    if head.meta.id not in uses.frozen and not uses.children.get(head.meta.id):
        return
    layer = new_layer(environment, head.spec.size, parent=head)
    environment.held.add(layer.meta.id)
    try:
        await environment.store.transact(Transaction(puts=[Put(layer)]))
        await make_layer(environment, layer.meta.id)
        found = await environment.store.get(Volume, volume)
        if found is not None:
            wanted = volume_status(found.record, head=layer.meta.id)
            await environment.store.transact(
                Transaction(checks=[Check(Volume, volume, found.revision)], puts=[Put(wanted)])
            )
    except BaseException:
        environment.held.discard(layer.meta.id)
        with contextlib.suppress(Exception):
            await collect_layers(environment)
        raise
    environment.held.discard(layer.meta.id)


async def _not_unchanged(environment: Environment, volume: str) -> None:
    """Writes that what checkpoints have of a volume as not to be written to will be: nothing was
    marked of it."""
    for item in (await environment.store.list(Checkpoint)).items:
        if any(one.volume == volume and one.read_only for one in item.record.status.disks):
            change = partial(_written_to, volume)
            await update(environment.store, Checkpoint, item.record.meta.id, change)


def _written_to(volume: str, checkpoint: Checkpoint) -> Checkpoint:
    disks = tuple(
        msgspec.structs.replace(one, read_only=False) if one.volume == volume else one
        for one in checkpoint.status.disks
    )
    status = msgspec.structs.replace(checkpoint.status, disks=disks)
    return msgspec.structs.replace(checkpoint, status=status)
