"""How an actor makes its VM's files, and removes them."""

from __future__ import annotations

import asyncio
from functools import partial

import structlog

from undercroft.host import power
from undercroft.host.actor import Outcome, VMActor
from undercroft.host.attachments import free_attached
from undercroft.host.cloned import can_boot_instead, make
from undercroft.host.datastores import layer_file
from undercroft.host.environment import UID_BASE, Environment
from undercroft.host.files import remove_tree
from undercroft.host.heads import own_head
from undercroft.host.importing import forget_upload, make_disks
from undercroft.host.layers import collect_layers, get_layer, head_layer, make_layer, volume_status
from undercroft.host.marks import checkpoints_of
from undercroft.host.outcome import TaskRun, change_status, write
from undercroft.host.restoring import make_restored
from undercroft.host.templates import collect_templates
from undercroft.model.checkpoint import Checkpoint
from undercroft.model.errors import UndercroftError
from undercroft.model.snapshot import Snapshot
from undercroft.model.vm import VM, Disk, Power, VMState
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.context import snapshot_scope
from undercroft.operations.vm_change import removal_releases
from undercroft.storage.files import allocated, sync_directory
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Delete, Put, Release, Transaction, update

log = structlog.get_logger(__name__)


async def create(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes directories and volumes, and starts the VM if asked to."""
    environment = actor.environment
    if vm.status.state is VMState.CREATING:
        uid = await _choose_uid(environment, vm)
        vm = change_status(vm, uid=uid)
        await in_thread(lambda _: _make_directories(environment, vm.meta.id))
    if "template" in run.arguments:
        environment.forks += 1
        try:
            return await make(actor, vm, run)
        except (UndercroftError, OSError) as error:
            if not await can_boot_instead(actor, run):
                raise
            log.warning("no warm start", vm=vm.meta.name, error=str(error))
        finally:
            environment.forks -= 1
    if vm.status.state is VMState.CREATING:
        if "import" in run.arguments:
            await make_disks(environment, vm, run)
        elif run.arguments.get("restore"):
            await make_restored(environment, vm, run)
        for disk in vm.spec.disks if "import" not in run.arguments else ():
            await run.progress(None, "making the disk")
            await _make_volume(environment, disk)
        made = await write(
            environment,
            VM,
            vm.meta.id,
            lambda record: change_status(record, state=VMState.STOPPED),
        )
        vm = made or vm
    # Whoever switches it off meanwhile does not want it started.
    if not run.arguments.get("start") or vm.spec.power is not Power.RUNNING:
        outcome = Outcome(lambda record: record)
    else:
        outcome = await power.start(actor, vm, run)
    outcome.result["vm"] = vm.meta.id
    if "import" in run.arguments:
        outcome.event, outcome.message = "vm.imported", f"{vm.label} was imported"
        outcome.result["notes"] = run.arguments.get("notes", [])
        outcome.after = partial(forget_upload, environment, run)
    if run.arguments.get("restore"):
        outcome.event, outcome.message = "backup.restored", f"{vm.label} was restored"
        outcome.after = partial(forget_upload, environment, run)
    if warm := str(run.arguments.get("warm", "")):
        environment.wish(vm.meta.id, warm)
    return outcome


async def undo(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Removes what a creation needed besides the VM, which stays: only its start failed."""
    await collect_templates(actor.environment)
    await forget_upload(actor.environment, run)
    return Outcome(lambda record: record)


async def _choose_uid(environment: Environment, vm: VM) -> int | None:
    """The user id that this VM's QEMU runs as: its own, so that no guest that breaks out of its
    QEMU can reach another's. None where the daemon itself is unprivileged."""
    if not environment.privileged:
        return None
    async with environment.uid_lock:
        if vm.status.uid is not None:
            return vm.status.uid
        listing = await environment.store.list(VM)
        taken = {item.record.status.uid for item in listing.items}
        uid = next(n for n in range(UID_BASE, UID_BASE + len(taken) + 1) if n not in taken)
        await write(environment, VM, vm.meta.id, lambda record: change_status(record, uid=uid))
        return uid


def _make_directories(environment: Environment, id: str) -> None:
    for path in (environment.vm_directory(id), environment.run_directory(id)):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)


async def _make_volume(environment: Environment, disk: Disk) -> None:
    """Makes a volume's file; does nothing if it is there already."""
    id = disk.volume
    found = await environment.store.get(Volume, id)
    if found is not None and found.record.status.state is VolumeState.READY:
        if found.record.spec.attached is not None and not disk.read_only:
            await own_head(environment, id)
        return
    head = await head_layer(environment, id)
    await make_layer(environment, head)
    taken = await asyncio.to_thread(
        allocated, await layer_file(environment, await get_layer(environment, head))
    )
    await update(
        environment.store,
        Volume,
        id,
        lambda record: volume_status(record, state=VolumeState.READY, allocated=taken),
    )


async def remove(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Ends the VM and removes its files and volumes."""
    environment = actor.environment
    if run.task.spec.verb == "vm.remove":  # not where it undoes a creation
        await run.commit()  # half a VM is of no use to anybody
    if actor.machine is not None:
        await actor.machine.quit()
        await actor.exited(None)
        actor.release()
    volumes = await _own_volumes(environment, vm)
    await free_attached(environment, vm.meta.id)
    await _give_up_layers(environment, vm, volumes)
    await collect_layers(environment)
    await in_thread(lambda _: _remove_files(environment, vm.meta.id))

    def extra(record: VM) -> tuple[list[Put], list[Delete], list[Release]]:
        deletes = [Delete(Volume, volume.meta.id) for volume in volumes]
        return [], deletes, removal_releases(record, volumes)

    return Outcome(
        lambda record: None,
        event="vm.removed",
        message=f"{vm.label} was removed",
        extra=extra,
        after=partial(collect_templates, environment),
    )


async def _own_volumes(environment: Environment, vm: VM) -> list[Volume]:
    volumes = []
    for disk in vm.spec.disks:
        found = await environment.store.get(Volume, disk.volume)
        if found is not None and found.record.spec.vm == vm.meta.id:
            volumes.append(found.record)
    return volumes


async def _give_up_layers(environment: Environment, vm: VM, volumes: list[Volume]) -> None:
    """Writes that a VM's volumes and snapshots need no layers any more; its snapshots are gone."""
    for volume in volumes:
        await update(environment.store, Volume, volume.meta.id, lambda v: volume_status(v, head=""))
    for checkpoint in await checkpoints_of(environment, vm.meta.id):
        gone = Delete(Checkpoint, checkpoint.meta.id)
        await environment.store.transact(Transaction(deletes=[gone]))
    for item in (await environment.store.list(Snapshot)).items:
        snapshot = item.record
        if snapshot.spec.vm == vm.meta.id:
            name = Release(snapshot_scope(vm.meta.id), snapshot.meta.name, snapshot.meta.id)
            await environment.store.transact(
                Transaction(
                    deletes=[Delete(Snapshot, snapshot.meta.id)],
                    releases=[] if snapshot.spec.passing else [name],
                )
            )


def _remove_files(environment: Environment, id: str) -> None:
    remove_tree(environment.run_directory(id))
    remove_tree(environment.vm_directory(id))
    sync_directory(environment.data / "vms")
