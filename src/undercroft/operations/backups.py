"""Backups of VMs: making, looking at, verifying, restoring and removing them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from pathlib import PurePosixPath

import msgspec

from undercroft.model.backup import (
    Backup,
    BackupCreate,
    BackupList,
    BackupStream,
    Pruned,
    PruneRequest,
)
from undercroft.model.base import Ref
from undercroft.model.checkpoint import CheckpointCreate
from undercroft.model.errors import (
    BusyError,
    InvalidError,
    UndercroftError,
    UnsupportedError,
    error_from_problem,
)
from undercroft.model.names import new_id
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM, Caller
from undercroft.operations.asking import Volumes, ask
from undercroft.operations.checkpoints import PIPE, CheckpointOperations
from undercroft.operations.context import Context, find, new_task
from undercroft.operations.tasks import TaskOperations
from undercroft.operations.volume_use import waiting
from undercroft.storage.backup.pruning import kept
from undercroft.store.interface import Put, Transaction

MAX_DESCRIPTION = 1024
PATIENCE = 300.0  # seconds that a VM may be busy with other things before it is sent


def owner_of(repository: str) -> str:
    """The owner of checkpoints that backups in a repository (its id) count from."""
    return f"backup/{repository}"


class BackupOperations:
    """Every verb on backups. A repository is named by its directory on the daemon's host."""

    def __init__(self, context: Context, checkpoints: CheckpointOperations) -> None:
        self._context = context
        self._checkpoints = checkpoints

    async def create(self, caller: Caller, ref: str, request: BackupCreate) -> Task:
        """Backs a VM up, running or not; it goes on meanwhile.

        Raises:
            InvalidError: the request makes no sense. WrongStateError: the VM is being made.
            DataError: the repository cannot be used.
        """
        caller.require("vm.backup")
        caller.require("host.files")
        path = check_repository(request.repository)
        if len(request.description) > MAX_DESCRIPTION:
            raise InvalidError(f"a description has at most {MAX_DESCRIPTION} characters")
        vm = (await find(self._context.store, VM, ref)).record
        if not request.decrypt:
            await _check_readable(self._context, vm)
        repository = await self._context.services.repository(path)

        async def prepare(vm: VM, _: Volumes) -> tuple[VM, dict[str, object]]:
            if not request.decrypt:  # as it is in the very transaction that asks for the backup
                await _check_readable(self._context, vm)
            wanted = CheckpointCreate(quiesce=request.quiesce, owner=owner_of(repository))
            return vm, await self._checkpoints.arguments(vm, wanted)

        def beside(vm: VM, making: Task) -> Task:
            return new_task(
                self._context,
                "backup.create",
                vm,
                caller.name,
                repository=path,
                backup=new_id("backup"),
                checkpoint=making.spec.arguments["checkpoint"],
                waits=making.meta.id,
                full=request.full,
                description=request.description,
            )

        return await ask(self._context, caller, vm.meta.id, "checkpoint.create", prepare, beside)

    async def stream(self, caller: Caller, ref: str, request: BackupStream) -> AsyncIterator[bytes]:
        """A backup of a VM as one archive, which has its manifest at its end. Nothing of it stays
        here.

        Raises:
            UndercroftError: what disks hold now could not be kept.
        """
        caller.require("vm.backup")
        if len(request.description) > MAX_DESCRIPTION:
            raise InvalidError(f"a description has at most {MAX_DESCRIPTION} characters")
        wanted = CheckpointCreate(quiesce=request.quiesce, owner=PIPE)
        vm = (await find(self._context.store, VM, ref)).record
        if not request.decrypt:
            await _check_readable(self._context, vm)
        making = await self._checkpoints.make(caller, vm.meta.id, wanted)
        id = str(making.spec.arguments["checkpoint"])
        try:
            tasks = TaskOperations(self._context)
            done = (await tasks.wait(SYSTEM, making.meta.id, PATIENCE)).record
            if done.status.error is not None:
                raise error_from_problem(done.status.error)
            if not done.status.state.final:
                raise BusyError(
                    f"{vm.label} is busy with other things",
                    object=vm.label,
                    action="see what it does: croft task ls; then try again",
                )
            checkpoint = (await self._checkpoints.get(SYSTEM, vm.meta.id, id)).record
            if not request.decrypt:  # one may have come meanwhile
                held = {disk.volume for disk in checkpoint.status.disks}
                await _check_volumes_readable(self._context, vm, held)
        except BaseException:
            await asyncio.shield(self._give_up(vm, id))
            raise
        description = request.description
        content = self._context.services.stream_backup(
            vm, checkpoint, new_id("backup"), description
        )
        return self._streamed(vm, id, content)

    async def _streamed(
        self, vm: VM, checkpoint: str, content: AsyncIterator[bytes]
    ) -> AsyncIterator[bytes]:
        try:
            async for piece in content:
                yield piece
        finally:
            if isinstance(content, AsyncGenerator):
                await content.aclose()
            await asyncio.shield(self._give_up(vm, checkpoint))

    async def _give_up(self, vm: VM, checkpoint: str) -> None:
        with contextlib.suppress(UndercroftError):  # the VM is being removed
            await self._checkpoints.give_up(SYSTEM, vm.meta.id, checkpoint)

    async def list(self, caller: Caller, repository: str, vm: str | None = None) -> BackupList:
        """The backups in a repository, oldest first; of one VM (its name or id), if given."""
        caller.require("host.files")
        found = await self._context.services.backups(check_repository(repository))
        if vm is None:
            return found
        chosen = tuple(backup for backup in found.backups if vm in (backup.name, backup.vm))
        return msgspec.structs.replace(found, backups=chosen)

    async def get(self, caller: Caller, repository: str, ref: str) -> Backup:
        """A backup: its id, or the name or id of a VM for its newest."""
        caller.require("host.files")
        return await self._context.services.backup(check_repository(repository), ref)

    async def verify(self, caller: Caller, repository: str, refs: Sequence[str] = ()) -> Task:
        """Reads backups (all, if none is named) and compares everything with its checksums. The
        task fails if anything is damaged.

        Raises:
            NotFoundError: there is no such repository or backup.
        """
        caller.require("host.files")
        path = check_repository(repository)
        ids = [await self._id(path, ref) for ref in refs]
        await self._context.services.backups(path)
        return await self._task(caller, "backup.verify", path, ids)

    async def remove(self, caller: Caller, repository: str, refs: Sequence[str]) -> Task:
        """Removes backups; others stay whole, also those that were made after them.

        Raises:
            NotFoundError: there is no such repository or backup.
        """
        caller.require("vm.backup")
        caller.require("host.files")
        path = check_repository(repository)
        return await self._task(
            caller, "backup.remove", path, [await self._id(path, ref) for ref in refs]
        )

    async def prune(self, caller: Caller, request: PruneRequest) -> Pruned:
        """Removes the backups that a rule does not keep; with ``dry_run`` only tells which.

        Raises:
            InvalidError: the rule would keep nothing.
        """
        caller.require("vm.backup")
        caller.require("host.files")
        path = check_repository(request.repository)
        counts = (request.last, request.daily, request.weekly, request.monthly)
        if min(counts) < 0 or not any(counts):
            raise InvalidError(
                "this would keep no backup at all", action="say what to keep, for instance --keep 7"
            )
        found = await self._context.services.backups(path)
        gone: list[Backup] = []
        for vm in sorted({backup.vm for backup in found.backups}):
            own = [backup for backup in found.backups if backup.vm == vm]
            if request.vm is not None and request.vm not in (vm, own[-1].name):
                continue
            stay = kept(
                own,
                last=request.last,
                daily=request.daily,
                weekly=request.weekly,
                monthly=request.monthly,
            )
            gone += [backup for backup in own if backup.id not in stay]
        if request.dry_run:
            return Pruned(backups=tuple(backup.id for backup in gone))
        ids = [backup.id for backup in gone]
        task = await self._task(caller, "backup.remove", path, ids)
        return Pruned(backups=tuple(ids), task=task)

    async def _id(self, repository: str, ref: str) -> str:
        return (await self._context.services.backup(repository, ref)).id

    async def _task(self, caller: Caller, verb: str, repository: str, ids: Sequence[str]) -> Task:
        subject = Ref(kind="repository", id=repository, name=repository)
        task = new_task(
            self._context, verb, subject, caller.name, repository=repository, backups=list(ids)
        )
        await self._context.store.transact(Transaction(puts=[Put(task)]))
        return task


def check_repository(path: str) -> str:
    """Returns a repository's path, without what does not matter.

    Raises:
        InvalidError: it is not absolute.
    """
    if not path.startswith("/") or "\0" in path or len(path) > 1024:
        raise InvalidError(
            f"{path[:80]!r} names no directory of the daemon's host",
            action="give a path that begins with /",
        )
    return str(PurePosixPath(path))


async def _check_readable(context: Context, vm: VM) -> None:
    """Whoever encrypts a disk does not want it written in the clear by the way. Disks that are
    still to be attached come before what is asked for now."""
    volumes = {disk.volume for disk in vm.spec.disks}
    for id in await waiting(context, vm, ("volume.attach", "snapshot.revert")):
        task = await context.store.get(Task, id)
        given = task.record.spec.arguments if task is not None else {}
        volumes |= {str(given.get("volume", "")), *given.get("volumes", ())}
    await _check_volumes_readable(context, vm, volumes)


async def _check_volumes_readable(context: Context, vm: VM, volumes: Iterable[str]) -> None:
    for id in volumes:
        volume = await context.store.get(Volume, id) if id else None
        if volume is not None and volume.record.spec.encrypted:
            raise UnsupportedError(
                f"{vm.label} has an encrypted disk, which a backup would have in the clear",
                object=vm.label,
                action="if whoever reads the backups may read the disk, say --decrypt",
            )
