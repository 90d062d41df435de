"""How an actor makes its VM's files, and removes them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec

from undercroft.host import power
from undercroft.host.actor import Outcome, VMActor
from undercroft.host.environment import UID_BASE, Environment
from undercroft.host.files import allocated, remove_tree
from undercroft.host.outcome import TaskRun, change_status, write
from undercroft.model.errors import DataError
from undercroft.model.image import Image
from undercroft.model.vm import VM, Power, VMState
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.vm_change import removal_releases
from undercroft.storage.threads import in_thread
from undercroft.storage.volumes import create_volume
from undercroft.store.interface import Delete, Put, Release, update


async def create(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes directories and volumes, and starts the VM if asked to."""
    environment = actor.environment
    if vm.status.state is VMState.CREATING:
        uid = await _choose_uid(environment, vm)
        await in_thread(lambda _: _make_directories(environment, vm.meta.id))
        for disk in vm.spec.disks:
            await run.progress(None, "making the disk")
            await _make_volume(environment, disk.volume)
        made = await write(
            environment,
            VM,
            vm.meta.id,
            lambda record: change_status(record, state=VMState.STOPPED, uid=uid),
        )
        vm = made or vm
    # Whoever switches it off meanwhile does not want it started.
    if not run.arguments.get("start") or vm.spec.power is not Power.RUNNING:
        return Outcome(lambda record: record, result={"vm": vm.meta.id})
    outcome = await power.start(actor, vm, run)
    outcome.result["vm"] = vm.meta.id
    return outcome


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


async def _make_volume(environment: Environment, id: str) -> None:
    """Makes a volume's file; does nothing if it is there already."""
    found = await environment.store.get(Volume, id)
    if found is None:
        raise DataError(f"the record of volume {id} is gone", object=f"volume {id}")
    volume = found.record
    path = environment.volume_path(id)
    base: tuple[Path, str] | None = None
    if volume.spec.image is not None:
        image = await environment.store.get(Image, volume.spec.image)
        content = image.record.status.content if image is not None else None
        if image is None or content is None or content.disk is None:
            raise DataError(f"the image of {volume.label} is gone", object=volume.label)
        directory = environment.data / "images" / str(image.record.status.digest)
        base = (directory / content.disk, content.disk_format.value)
    if not path.exists():
        await create_volume(path, volume.spec.size, base=base, tmp=environment.tmp)
    taken = await asyncio.to_thread(allocated, path)
    await update(
        environment.store,
        Volume,
        id,
        lambda record: msgspec.structs.replace(
            record,
            status=msgspec.structs.replace(record.status, state=VolumeState.READY, allocated=taken),
        ),
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
    volumes = []
    for disk in vm.spec.disks:
        found = await environment.store.get(Volume, disk.volume)
        if found is not None and found.record.spec.vm == vm.meta.id:
            volumes.append(found.record)
    await in_thread(lambda _: _remove_files(environment, vm.meta.id, volumes))

    def extra(record: VM) -> tuple[list[Put], list[Delete], list[Release]]:
        deletes = [Delete(Volume, volume.meta.id) for volume in volumes]
        return [], deletes, removal_releases(record, volumes)

    return Outcome(
        lambda record: None,
        event="vm.removed",
        message=f"{vm.label} was removed",
        extra=extra,
    )


def _remove_files(environment: Environment, id: str, volumes: list[Volume]) -> None:
    for volume in volumes:
        environment.volume_path(volume.meta.id).unlink(missing_ok=True)
    remove_tree(environment.run_directory(id))
    remove_tree(environment.vm_directory(id))
    for parent in (environment.data / "volumes", environment.data / "vms"):
        handle = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
