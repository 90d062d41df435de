"""How what a backup holds becomes the disks of a VM again: of a new one, or of one that exists.

A disk is restored into a new file in DATA/tmp, and becomes a layer when it is whole. So whatever is
killed or full, a VM has either all that it had, or all that the backup has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from undercroft.host import power
from undercroft.host.actor import Outcome, VMActor
from undercroft.host.datastores import driver, file_name
from undercroft.host.environment import Environment
from undercroft.host.imaging import reported
from undercroft.host.importing import forget_upload
from undercroft.host.layers import collect_layers, get_layer, new_layer, volume_status
from undercroft.host.outcome import TaskRun, change_status, write
from undercroft.host.reading import opened, serving
from undercroft.host.snapshot_files import restore_state, staged_state
from undercroft.host.uploads import upload_path
from undercroft.hypervisor.plan import DiskFormat, DiskLayer
from undercroft.hypervisor.state_file import discard_state
from undercroft.model.backup import Backup, BackupDisk
from undercroft.model.errors import DataError, StaleError
from undercroft.model.layer import Layer, LayerState
from undercroft.model.vm import VM, Power, VMState
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.context import ATTEMPTS
from undercroft.storage.backup.archive import Archive
from undercroft.storage.backup.packs import Packs
from undercroft.storage.backup.reading import read_disk, restore_files
from undercroft.storage.backup.repository import Repository, RepositoryLock
from undercroft.storage.files import disk_full_is_clear, remove_tree, sync_directory
from undercroft.storage.threads import Stop, in_thread
from undercroft.storage.volumes import create_volume
from undercroft.store.interface import Check, Put, Transaction, Versioned

Report = Callable[[float, str], None]


async def make_restored(environment: Environment, vm: VM, run: TaskRun) -> None:
    """Makes the volumes and files of a new VM from the backup that the task names.

    Raises:
        UndercroftError: it did not work, and can be tried again.
    """
    async with Restoring(environment, vm, run) as restoring:
        directory = environment.vm_directory(vm.meta.id)
        await in_thread(lambda _: restoring.files(directory))
        for index, disk in enumerate(vm.spec.disks):
            found = await environment.store.get(Volume, disk.volume)
            if found is not None and found.record.status.state is VolumeState.READY:
                continue  # by a daemon that died after that
            await _become(environment, [await restoring.disk(index, disk.volume)])


async def restore_over(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes a VM what it was when it was backed up. It goes on until what the backup holds is all
    here; what it has become since is lost unless a snapshot has it."""
    environment = actor.environment
    async with Restoring(environment, vm, run) as restoring:
        places = run.arguments.get("places") or range(len(vm.spec.disks))
        made = [
            await restoring.disk(index, disk.volume)
            for index, disk in zip(places, vm.spec.disks, strict=True)
        ]
        directory = environment.vm_directory(vm.meta.id)
        await in_thread(lambda _: restoring.files(directory, stage=True))
        await run.commit()
        if actor.machine is not None:
            await run.progress(None, "switching it off")
            await actor.machine.quit()
            await actor.exited(None)
            actor.release()
        saved = environment.suspended_path(vm.meta.id)
        await in_thread(lambda _: discard_state(saved))
        await write(
            environment,
            VM,
            vm.meta.id,
            lambda v: change_status(v, state=VMState.STOPPED, instance=None),
        )
        await _become(environment, made)
        await in_thread(lambda _: restore_state(directory))
    await collect_layers(environment)
    shape = run.arguments.get("shape")

    def change(record: VM) -> VM:
        if isinstance(shape, dict):
            record = msgspec.structs.replace(
                record,
                spec=msgspec.convert(
                    {**msgspec.to_builtins(record.spec), **shape}, type(record.spec)
                ),
            )
        return change_status(
            record,
            state=VMState.STOPPED,
            instance=None,
            addresses=(),
            agent=None,
            message=None,
            snapshot=None,
            returns=record.status.returns + 1,
        )

    restored = await write(environment, VM, vm.meta.id, change)
    outcome = Outcome(lambda record: record)
    if restored is not None and restored.spec.power is Power.RUNNING:
        outcome = await power.start(actor, restored, run)
    outcome.event = "backup.restored"
    outcome.message = f"{vm.label} was restored from backup {run.arguments['backup']}"
    outcome.after = partial(forget_upload, environment, run)
    return outcome


@dataclass(frozen=True)
class Restored:
    """What a volume (its id) is to hold, in a file."""

    volume: str
    path: Path
    size: int
    encrypted: bool


class Restoring:
    """A backup being read for a VM; the repository stays as it is inside the block."""

    def __init__(self, environment: Environment, vm: VM, run: TaskRun) -> None:
        self._environment = environment
        self._vm = vm
        self._run = run
        self._lenient = bool(run.arguments.get("damaged"))
        self._made: list[Path] = []
        self._staged: Path | None = None
        self._packs: Packs | Archive | None = None
        self._lock: RepositoryLock | None = None
        self.backup: Backup

    async def __aenter__(self) -> Restoring:
        if self._run.arguments.get("upload"):
            return await self._open_upload(str(self._run.arguments["upload"]))
        path = Path(str(self._run.arguments["repository"]))
        repository = await asyncio.to_thread(Repository.open, path)
        self._lock = lock = repository.lock(share=True)
        while not await asyncio.to_thread(lock.try_lock):
            await self._run.progress(None, "waiting for the repository")
            await asyncio.sleep(0.2)
        try:
            self.backup = await asyncio.to_thread(
                repository.get, str(self._run.arguments["backup"])
            )
            self._packs = await asyncio.to_thread(repository.packs)
        except BaseException:
            lock.close()
            raise
        return self

    async def _open_upload(self, key: str) -> Restoring:
        environment = self._environment
        path = upload_path(environment, key)
        self._packs = archive = await in_thread(lambda _: Archive.open(path, environment.tmp))
        self.backup = archive.backup
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._packs is not None:
            self._packs.close()
        if self._lock is not None:
            self._lock.close()
        if self._staged is not None:
            await asyncio.to_thread(remove_tree, self._staged)
        for path in self._made:
            await asyncio.to_thread(path.unlink, missing_ok=True)
            await asyncio.to_thread(self._environment.keys.remove, path.name)

    def get(self, digest: bytes) -> bytes:
        """A content of the repository."""
        if self._packs is None:
            raise DataError("the repository is closed")
        return self._packs.get(digest)

    def files(self, directory: Path, *, stage: bool = False) -> None:
        """Puts the files beside the disks into the VM's directory, or only where `restore_state`
        needs no more room (gone with the block, too). Blocks."""
        with disk_full_is_clear("restoring a backup", directory):
            if stage:
                directory = self._staged = staged_state(directory)
                remove_tree(directory)
                directory.mkdir(mode=0o700)
            restore_files(self.get, self.backup, directory, lenient=self._lenient)
            sync_directory(directory)

    async def disk(self, index: int, id: str) -> Restored:
        """Restores a disk of the backup, for a volume (its id), into a new file; gone with the
        block unless it is moved away.

        Raises:
            UndercroftError: it did not work.
        """
        environment = self._environment
        disk = self.backup.disks[index]
        volume = await environment.store.get(Volume, id)
        store = await driver(environment, await _datastore(environment, volume))
        path = store.half()
        self._made.append(path)
        key: Path | None = None
        encrypted = disk.encrypted or (volume is not None and volume.record.spec.encrypted)
        if encrypted:
            key = await asyncio.to_thread(environment.keys.make, path.name)
        await create_volume(path, disk.size, tmp=path.parent, key=key)
        layer = DiskLayer(
            path=str(path),
            format=DiskFormat.QCOW2,
            node=f"restored{index}",
            key=str(key) if key is not None else None,
        )
        async with (
            reported(self._run) as report,
            serving(environment, self._vm, [layer], write=True) as export,
        ):

            def copy(stop: Stop) -> None:
                with opened(export, (), stop) as client:
                    for offset, content in self._content(disk):
                        stop.check()
                        client.write(offset, content)
                        report(offset / disk.size, f"restoring disk {index}")
                    client.flush()

            await in_thread(copy)
        return Restored(id, path, disk.size, encrypted)

    def _content(self, disk: BackupDisk) -> Any:
        return read_disk(self.get, self.backup, disk, lenient=self._lenient)


async def _become(environment: Environment, restored: Sequence[Restored]) -> None:
    """Makes restored files the only layers of their volumes, all at once."""
    async with environment.layers_lock:  # nobody must find them without use
        ready: list[Layer] = []
        for one in restored:
            found = await _volume(environment, one.volume)
            layer = new_layer(
                environment,
                one.size,
                datastore=await _datastore(environment, found),
                encrypted=one.encrypted,
            )
            store = await driver(environment, layer.spec.datastore)
            await environment.store.transact(Transaction(puts=[Put(layer)]))
            if layer.spec.encrypted:
                await asyncio.to_thread(environment.keys.copy, one.path.name, layer.meta.id)
            await store.adopt(one.path, file_name(layer))
            status = msgspec.structs.replace(layer.status, state=LayerState.READY)
            ready.append(msgspec.structs.replace(layer, status=status))
        for _ in range(ATTEMPTS):
            checks: list[Check] = []
            puts = [Put(layer) for layer in ready]
            for one, layer in zip(restored, ready, strict=True):
                found = await _volume(environment, one.volume)
                wanted = volume_status(found.record, head=layer.meta.id, state=VolumeState.READY)
                spec = msgspec.structs.replace(
                    wanted.spec, size=one.size, image=None, encrypted=one.encrypted
                )
                checks.append(Check(Volume, one.volume, found.revision))
                puts.append(Put(msgspec.structs.replace(wanted, spec=spec)))
            with contextlib.suppress(StaleError):
                await environment.store.transact(Transaction(checks=checks, puts=puts))
                return
    raise StaleError("the volumes keep changing", action="restore the backup again")


async def _volume(environment: Environment, id: str) -> Versioned[Volume]:
    found = await environment.store.get(Volume, id)
    if found is None:
        raise DataError(f"the record of volume {id} is gone", object=f"volume {id}")
    return found


async def _datastore(environment: Environment, volume: Versioned[Volume] | None) -> str | None:
    """The datastore that a volume is in now, or is to be in."""
    if volume is None:
        return None
    if volume.record.status.head:
        return (await get_layer(environment, volume.record.status.head)).spec.datastore
    return volume.record.spec.datastore
