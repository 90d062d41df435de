"""The host agent: follows the store and gives every VM and image of this host its actor.

Nothing of what it knows is only in its memory: killed at any moment and started again, it reads
the store, finds its VMs' processes again and carries on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any

import structlog

from undercroft.host import orphans
from undercroft.host.actor import VMActor
from undercroft.host.backups import VERBS as BACKUP_VERBS
from undercroft.host.backups import BackupWorker
from undercroft.host.check import check_host
from undercroft.host.datastores import open_datastores
from undercroft.host.environment import Environment
from undercroft.host.exports import ExportWorker, sweep_exports
from undercroft.host.exports import remove_files as remove_export
from undercroft.host.forgetting import sweep_snapshots
from undercroft.host.housekeeping import keep_house
from undercroft.host.images import ImageWorker
from undercroft.host.layers import collect_layers, rename_volumes
from undercroft.host.outcome import final_status
from undercroft.host.pool import Pool
from undercroft.host.services import LocalHost
from undercroft.host.templates import remove_files, sweep_templates
from undercroft.host.verbs import VM_VERBS
from undercroft.host.volume_clone import collect_clones
from undercroft.host.volumes import VolumeWorker
from undercroft.host.warming import Room, Warmer
from undercroft.host.worker import Worker
from undercroft.hypervisor.machine import QemuMachine
from undercroft.model.base import Record
from undercroft.model.errors import CompactedError, UnavailableError, UndercroftError
from undercroft.model.export import Export
from undercroft.model.image import Image
from undercroft.model.requests import CheckReport
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.checkpoints import CheckpointOperations
from undercroft.operations.context import Context
from undercroft.store.interface import Change, Put, Transaction

log = structlog.get_logger(__name__)

RETRY_INTERVAL = 1.0  # seconds before the store is followed again after a fault
_WORKERS: dict[type[Record], type[Worker[Any]]] = {
    Image: ImageWorker,
    Volume: VolumeWorker,
    Export: ExportWorker,
}
WATCHED: tuple[type[Record], ...] = (VM, Image, Volume, Export, Task, Template)


class HostAgent:
    """Owner of all that runs on this host. `start` it, `close` it; VMs run on. ``room`` is what
    warm templates may take (None: nothing)."""

    def __init__(self, environment: Environment, room: Room | None = None) -> None:
        self.environment = environment
        self.services = LocalHost(environment, self.machine, self.check, self.held)
        self._actors: dict[str, VMActor] = {}
        self._workers: dict[str, Worker[Any]] = {}  # of images, volumes, exports
        context = Context(environment.store, environment.host, self.services, environment.clock)
        self._backups = BackupWorker(environment, CheckpointOperations(context))
        self._background: list[asyncio.Task[None]] = []
        self._removals: set[asyncio.Task[None]] = set()
        self.warmer = Warmer(environment, context, self.machine, room or Room(count=0))
        environment.wish = self.warmer.wish
        self.pool = Pool(environment, context, room.pool if room is not None else 0)
        environment.used = self.pool.used

    def machine(self, vm: str) -> QemuMachine | None:
        """The running machine of a VM."""
        actor = self._actors.get(vm)
        return actor.machine if actor is not None else None

    def held(self, template: str) -> list[str]:
        """The VMs (ids) that are held ready on a template."""
        return self.pool.held(template)

    async def start(self) -> None:
        """Adopts what runs, ends what nobody owns, then follows the store."""
        await asyncio.to_thread(self.environment.directory.sweep)
        await open_datastores(self.environment)
        vms = await self.environment.store.list(VM)
        known = {
            item.record.meta.id: item.record
            for item in vms.items
            if item.record.spec.host == self.environment.host
        }
        await asyncio.to_thread(rename_volumes, self.environment.directory.volumes)
        await asyncio.gather(*(self._adopt(vm) for vm in known.values()))
        await orphans.end_orphans(self.environment, self._owned())
        images = await self.environment.store.list(Image)
        volumes = await self.environment.store.list(Volume)
        exports = await self.environment.store.list(Export)
        await self._end_ownerless_tasks(known)
        await sweep_snapshots(self.environment)
        await sweep_templates(self.environment)
        await collect_clones(self.environment)
        await sweep_exports(self.environment)
        await collect_layers(self.environment)
        for image in images.items:
            self._wake_worker(image.record)
        for volume in volumes.items:
            self._wake_worker(volume.record)
        for export in exports.items:
            self._wake_worker(export.record)
        for actor in self._actors.values():
            actor.launch()
        for item in (await self.environment.store.list(Task)).items:
            self._backups.wake(item.record)
        await self._backups.sweep()
        revision = min(vms.revision, images.revision, volumes.revision, exports.revision)
        self._background = [
            asyncio.create_task(self._follow(revision), name="follow"),
            asyncio.create_task(
                keep_house(self.environment, self.warmer.shrink), name="housekeeping"
            ),
            asyncio.create_task(self.warmer.run(), name="warmer"),
            asyncio.create_task(self.pool.run(), name="pool"),
        ]

    async def close(self) -> None:
        """Stops acting. VMs run on; tasks under way are taken up at the next start."""
        self.environment.closing = True
        for task in self._background:
            task.cancel()
        for task in self._background:
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await asyncio.gather(*self._removals, return_exceptions=True)
        await asyncio.gather(
            *(actor.close() for actor in self._actors.values()),
            *(worker.close() for worker in self._workers.values()),
            self._backups.close(),
        )

    async def check(self, repair: bool) -> CheckReport:
        """Looks for what a crash left behind."""
        return await check_host(self.environment, self._owned, repair)

    # -- start-up ---------------------------------------------------------------------------

    async def _adopt(self, vm: VM) -> None:
        actor = self._actors[vm.meta.id] = VMActor(self.environment, vm.meta.id, VM_VERBS)
        await actor.adopt(vm)

    def _owned(self) -> set[str]:
        """The VMs whose processes are accounted for."""
        owned = {id for id, actor in self._actors.items() if actor.accounts_for_process}
        return owned | self.environment.serving

    async def _end_ownerless_tasks(self, vms: dict[str, VM]) -> None:
        """A task whose object is gone, or no longer lists it, cannot be carried out by anybody."""
        listed = {task for vm in vms.values() for task in vm.tasks}
        for item in (await self.environment.store.list(Image)).items:
            listed.update(item.record.tasks)
        for found in (await self.environment.store.list(Volume)).items:
            listed.update(found.record.tasks)
        for export in (await self.environment.store.list(Export)).items:
            listed.update(export.record.tasks)
        now = self.environment.clock()
        for entry in (await self.environment.store.list(Task)).items:
            task = entry.record
            if task.status.state.final or task.meta.id in listed:
                continue
            if task.spec.host != self.environment.host or task.spec.verb in BACKUP_VERBS:
                continue
            error = UndercroftError(f"{task.spec.object.kind} {task.spec.object.name} is gone")
            await self.environment.store.transact(
                Transaction(puts=[Put(final_status(task, now, error, False, None))])
            )

    # -- following --------------------------------------------------------------------------

    async def _follow(self, revision: int) -> None:
        while True:
            try:
                if revision < 0:
                    revision = await self._list_again()
                async with aclosing(self.environment.store.watch(WATCHED, revision)) as batches:
                    async for batch in batches:
                        for change in batch.changes:
                            self._on_change(change)
                        revision = batch.revision
                raise UnavailableError("the watch has ended")
            except CompactedError:
                revision = -1
            except UndercroftError as error:
                log.error("following the store failed", code=error.code, error=error.message)
                await asyncio.sleep(RETRY_INTERVAL)
            except Exception:
                log.exception("following the store failed")
                revision = -1
                await asyncio.sleep(RETRY_INTERVAL)

    async def _list_again(self) -> int:
        """Takes note of all there is, after changes were missed; the revision to go on from."""
        revision = await self.environment.store.revision()
        known: list[tuple[type[Record], str]] = [(VM, id) for id in self._actors]
        known += [(worker.kind, id) for id, worker in self._workers.items()]
        for kind in WATCHED:
            for item in (await self.environment.store.list(kind)).items:
                self._on_change(Change(kind, item.record.meta.id, item.record, item.revision))
        for gone, id in known:
            if await self.environment.store.get(gone, id) is None:
                self._on_change(Change(gone, id, None, revision))
        return revision

    def _on_change(self, change: Change) -> None:
        record = change.record
        if change.kind is VM:
            self._on_vm(change.id, record)
        elif isinstance(record, (Image, Volume, Export)):
            self._wake_worker(record)
        elif change.kind in (Image, Volume, Export):
            self._workers.pop(change.id, None)
            if change.kind is Export:
                self._remove(remove_export(self.environment, change.id))
        elif change.kind is Template and record is None:
            self.pool.gone(change.id)
            self._remove(remove_files(self.environment, change.id))
        elif isinstance(record, Task) and not record.status.state.final:
            if record.spec.cancel:
                self._cancel(record)
            else:
                self._backups.wake(record)

    def _remove(self, work: Coroutine[Any, Any, None]) -> None:
        removal = asyncio.create_task(work)
        self._removals.add(removal)
        removal.add_done_callback(self._removals.discard)

    def _on_vm(self, id: str, record: Record | None) -> None:
        actor = self._actors.get(id)
        if actor is None:
            if not isinstance(record, VM) or record.spec.host != self.environment.host:
                return
            actor = self._actors[id] = VMActor(self.environment, id, VM_VERBS)
            actor.launch()
        elif record is None:
            del self._actors[id]
        actor.wake()

    def _wake_worker(self, record: Image | Volume | Export) -> None:
        worker = self._workers.get(record.meta.id)
        if worker is None:
            if not record.tasks:
                return  # nothing to do, and perhaps never will be
            make = _WORKERS[type(record)]
            worker = self._workers[record.meta.id] = make(self.environment, record.meta.id)
        worker.wake(record)

    def _cancel(self, task: Task) -> None:
        target = task.spec.object
        if task.spec.verb in BACKUP_VERBS:
            self._backups.cancel_task(task)
        elif target.kind == VM.kind and target.id in self._actors:
            self._actors[target.id].cancel_task(task.meta.id)
        elif target.id in self._workers:
            self._workers[target.id].cancel_task(task.meta.id)
