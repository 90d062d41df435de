"""How an actor has its VM go back to a snapshot.

All that can fail for want of room comes first, and the VM stays what it is until then. What then
is done can be repeated.
"""

from __future__ import annotations

import contextlib

import msgspec

from undercroft.host import power
from undercroft.host.actor import Outcome, VMActor
from undercroft.host.attachments import disk_of, free_volume, sized
from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.layers import (
    check_chain,
    collect_layers,
    get_layer,
    make_layer,
    new_layer,
    volume_status,
)
from undercroft.host.outcome import TaskRun, change_spec, change_status, write
from undercroft.host.snapshot_files import check_state, restore_state, stage_state, staged_state
from undercroft.hypervisor.state_file import discard_state, link_state
from undercroft.model.errors import DataError, StaleError
from undercroft.model.layer import Layer
from undercroft.model.snapshot import Snapshot
from undercroft.model.vm import VM, Power, VMState
from undercroft.model.volume import Volume
from undercroft.operations.context import ATTEMPTS
from undercroft.operations.snapshots import shape
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Check, Put, Transaction


async def revert(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes the VM what it was; what it has become since is lost unless a snapshot has it.

    Raises:
        DataError, NoSpaceError: what it is to go back to is gone, or there is no room. The VM is
            what it was.
    """
    environment = actor.environment
    found = await environment.store.get(Snapshot, str(run.arguments["snapshot"]))
    if found is None:
        raise DataError("the snapshot is gone", object=f"snapshot {run.arguments.get('name')}")
    snapshot = found.record
    layers = await _new_heads(environment, snapshot)
    directory = environment.vm_directory(vm.meta.id)
    try:
        await in_thread(lambda _: stage_state(environment, snapshot))
        await run.commit()
        if actor.machine is not None:
            await run.progress(None, "switching it off")
            await actor.machine.quit()
            await actor.exited(None)
            actor.release()
        saved = environment.suspended_path(vm.meta.id)
        await in_thread(lambda _: discard_state(saved))
        await _switch(environment, vm.meta.id, snapshot, layers)
    finally:
        environment.held -= {layer.meta.id for layer in layers.values()}
    await collect_layers(environment)
    await in_thread(lambda _: restore_state(directory))
    if snapshot.status.memory:
        memory = environment.snapshot_directory(snapshot) / "memory"
        await in_thread(lambda _: link_state(memory, saved))
    reverted = await write(environment, VM, vm.meta.id, lambda record: _gone_back(record, snapshot))
    outcome = Outcome(lambda record: record)
    if reverted is not None and reverted.spec.power is Power.RUNNING:
        outcome = await power.start(actor, reverted, run)
    outcome.event = "snapshot.reverted"
    outcome.message = f"{vm.label} went back to snapshot {snapshot.meta.name}"
    return outcome


async def _new_heads(environment: Environment, snapshot: Snapshot) -> dict[str, Layer]:
    """For each volume a new, empty layer over what the snapshot has of it. They are held until
    they are in use."""
    await in_thread(lambda _: check_state(environment, snapshot))
    layers: dict[str, Layer] = {}
    for disk in snapshot.status.disks:
        await check_chain(environment, disk.layer)
        volume = await environment.store.get(Volume, disk.volume)
        if volume is not None and volume.record.status.head == disk.layer == disk.next:
            continue  # it was for reading only, and nobody has written to it since
        below = await get_layer(environment, disk.layer)
        layers[disk.volume] = new_layer(environment, below.spec.size, parent=below)
    environment.held |= {layer.meta.id for layer in layers.values()}
    try:
        await environment.store.transact(
            Transaction(puts=[Put(layer) for layer in layers.values()])
        )
        for layer in layers.values():
            await make_layer(environment, layer.meta.id)
    except BaseException:
        environment.held -= {layer.meta.id for layer in layers.values()}
        with contextlib.suppress(Exception):
            await collect_layers(environment)
        raise
    return layers


async def _switch(
    environment: Environment, vm: str, snapshot: Snapshot, layers: dict[str, Layer]
) -> None:
    """Gives the VM the shape and the disks that it had, and has these write to their new layers,
    all at once. Volumes that it has gained since stand for themselves from now on.

    Raises:
        DataError: a record is gone.
    """
    for _ in range(ATTEMPTS):
        held = await environment.store.get(VM, vm)
        if held is None:
            raise DataError(f"the record of {vm} is gone", object=f"vm {vm}")
        shaped = _shaped(held.record, snapshot)
        checks = [Check(VM, vm, held.revision)]
        puts = [Put(shaped)]
        then = {disk.volume for disk in shaped.spec.disks}
        gained = {disk.volume for disk in held.record.spec.disks} - then
        for id in {*layers, *gained}:
            found = await environment.store.get(Volume, id)
            if found is None and id in gained:
                continue
            if found is None:
                raise DataError(f"the record of volume {id} is gone", object=f"volume {id}")
            checks.append(Check(Volume, id, found.revision))
            puts.append(Put(_changed(found.record, layers.get(id), alone=id in gained)))
        with contextlib.suppress(StaleError):
            await environment.store.transact(Transaction(checks=checks, puts=puts))
            return
    raise StaleError(f"vm {vm} keeps changing", object=f"vm {vm}")


def _changed(volume: Volume, layer: Layer | None, *, alone: bool) -> Volume:
    if layer is not None:
        volume = sized(volume_status(volume, head=layer.meta.id), layer.spec.size)
    if alone:
        spec = msgspec.structs.replace(volume.spec, vm=None, attached=None)
        volume = msgspec.structs.replace(volume, spec=spec)
    return volume


async def undo(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Lets go of the volumes that were to be the VM's again, and did not become so."""
    environment = actor.environment
    found = await environment.store.get(VM, vm.meta.id)
    for volume in run.arguments.get("volumes", ()):
        if found is None or disk_of(found.record, volume) is None:
            await free_volume(environment, volume, vm.meta.id)
    staged = staged_state(environment.vm_directory(vm.meta.id))
    await in_thread(lambda _: remove_tree(staged))
    await collect_layers(environment)
    return Outcome(lambda record: record)


def _shaped(record: VM, snapshot: Snapshot) -> VM:
    """The VM, switched off, with the shape and the disks that it had."""
    then = snapshot.status.shape
    disks = then.disks if then is not None else record.spec.disks
    shaped = change_spec(record, disks=disks, **shape(then))
    if shaped != record:
        meta = msgspec.structs.replace(record.meta, generation=record.meta.generation + 1)
        record = msgspec.structs.replace(shaped, meta=meta)
    returns = record.status.returns + 1
    return change_status(record, state=VMState.STOPPED, instance=None, returns=returns)


def _gone_back(record: VM, snapshot: Snapshot) -> VM:
    return change_status(
        record,
        state=VMState.SUSPENDED if snapshot.status.memory else VMState.STOPPED,
        instance=None,
        addresses=(),
        agent=None,
        message=None,
        snapshot=snapshot.meta.id,
    )
