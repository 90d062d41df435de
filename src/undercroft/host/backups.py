"""Carries out the tasks that concern repositories of backups, beside what the VMs' actors do: a VM
can be switched, snapshotted and even removed while it is being backed up."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from undercroft.host.backing_up import Held, back_up, finished, result
from undercroft.host.environment import Environment
from undercroft.host.imaging import reported
from undercroft.host.marks import checkpoints_of
from undercroft.host.outcome import TaskRun, finish, unexpected
from undercroft.model.backup import Backup
from undercroft.model.checkpoint import Checkpoint, CheckpointState
from undercroft.model.errors import (
    CancelledTaskError,
    DataCorruptError,
    DataError,
    NotFoundError,
    UndercroftError,
    error_from_problem,
)
from undercroft.model.event import EventLevel
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM
from undercroft.operations.access import SYSTEM
from undercroft.operations.checkpoints import PIPE, CheckpointOperations
from undercroft.storage.backup.pruning import sweep
from undercroft.storage.backup.reading import verify
from undercroft.storage.backup.repository import Repository
from undercroft.storage.threads import Stop, in_thread

log = structlog.get_logger(__name__)

VERBS = ("backup.create", "backup.verify", "backup.remove")
_LOOK = 0.05  # seconds between two looks at a checkpoint that is being made
Done = tuple[dict[str, Any], tuple[str, str, EventLevel] | None]


class BackupWorker:
    """All tasks of backups of this host, each in an asyncio task of its own."""

    def __init__(self, environment: Environment, checkpoints: CheckpointOperations) -> None:
        self.environment = environment
        self._checkpoints = checkpoints
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._committed: set[str] = set()
        self._verbs: dict[str, Callable[[TaskRun], Awaitable[Done]]] = {
            "backup.create": self._create,
            "backup.verify": self._verify,
            "backup.remove": self._remove,
        }

    def wake(self, task: Task) -> None:
        """A task's record changed: begins it if that has not been."""
        id = task.meta.id
        if task.status.state.final or id in self._running or self.environment.closing:
            return
        if task.spec.verb not in VERBS or task.spec.host != self.environment.host:
            return
        self._running[id] = work = asyncio.create_task(self._do(task), name=task.spec.verb)
        work.add_done_callback(partial(self._done, task))

    def _done(self, task: Task, work: asyncio.Task[None]) -> None:
        del self._running[task.meta.id]
        if work.cancelled():  # before it could write that it was
            self.wake(task)
        elif (error := work.exception()) is not None:
            log.error("backup work failed", task=task.meta.id, exc_info=error)

    async def sweep(self) -> None:
        """Lets go what was being sent when the last daemon ended. For the agent, at its start."""
        for item in (await self.environment.store.list(Checkpoint)).items:
            if item.record.spec.owner == PIPE:
                with contextlib.suppress(UndercroftError):  # its VM is being removed
                    await self._checkpoints.give_up(
                        SYSTEM, item.record.spec.vm, item.record.meta.id
                    )

    def cancel_task(self, task: Task) -> None:
        """Stops a task, unless it is as good as done."""
        id = task.meta.id
        work = self._running.get(id)
        if work is None:
            self.wake(task)
        elif id not in self._cancelled | self._committed:
            self._cancelled.add(id)
            work.cancel()

    async def close(self) -> None:
        """Stops; what was under way is taken up by the next daemon."""
        for work in list(self._running.values()):
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await work

    async def _do(self, task: Task) -> None:
        run = TaskRun(self.environment, task)
        error: UndercroftError | None = None
        outcome: Done = ({}, None)
        cancelled = task.spec.cancel or task.meta.id in self._cancelled
        try:
            if not cancelled:
                await run.begin()
                outcome = await self._verbs[task.spec.verb](run)
        except (asyncio.CancelledError, CancelledTaskError):
            if task.meta.id not in self._cancelled:
                raise  # the daemon is closing
            cancelled = True
        except UndercroftError as caught:
            error = caught
        except Exception as caught:
            log.exception("task failed", task=task.meta.id)
            error = unexpected(caught, task)
        self._cancelled.discard(task.meta.id)
        self._committed.add(task.meta.id)
        if error is not None or cancelled:
            if task.spec.verb == "backup.create":
                await self._give_up(run)
            told = "was cancelled" if error is None else f"failed: {error.message}"
            level = EventLevel.INFO if error is None else EventLevel.ERROR
            message = f"{task.spec.verb} of {task.spec.object.name} {told}"
            outcome = ({}, (f"{task.spec.verb}.failed", message, level))
        await finish(
            self.environment,
            VM,
            task.spec.object.id,
            task.meta.id,
            change=lambda vm: vm,
            error=error,
            cancelled=cancelled and error is None,
            result=outcome[0],
            event=outcome[1],
        )
        self._committed.discard(task.meta.id)

    # -- making one -------------------------------------------------------------------------

    async def _create(self, run: TaskRun) -> Done:
        made = await asyncio.to_thread(finished, run)
        vm = await self._vm(run)
        if made is None:
            checkpoint = await self._checkpoint(run)
            made = await back_up(self.environment, vm, checkpoint, run)
        self._committed.add(run.id)
        await asyncio.shield(self._let_go(vm, str(run.arguments["checkpoint"])))
        message = f"{vm.label} was backed up to {run.arguments['repository']}"
        return result(made), ("backup.created", message, EventLevel.INFO)

    async def _vm(self, run: TaskRun) -> VM:
        found = await self.environment.store.get(VM, run.task.spec.object.id)
        if found is None:
            raise NotFoundError(
                f"vm {run.task.spec.object.name} was removed",
                object=f"vm {run.task.spec.object.name}",
            )
        return found.record

    async def _checkpoint(self, run: TaskRun) -> Checkpoint:
        """Waits for the checkpoint of a backup.

        Raises:
            UndercroftError: why it was not made.
        """
        id, making = str(run.arguments["checkpoint"]), str(run.arguments["waits"])
        store = self.environment.store
        told = False
        while True:
            task = await store.get(Task, making)
            found = await store.get(Checkpoint, id)
            if found is not None and found.record.status.snapshot is not None:
                return found.record
            if task is None or task.record.status.state.final:
                problem = task.record.status.error if task is not None else None
                if problem is not None:
                    raise error_from_problem(problem)
                if task is not None and task.record.status.state is TaskState.CANCELLED:
                    raise DataError("the checkpoint of this backup was cancelled")
                raise DataError(
                    "the checkpoint of this backup is gone", action="make the backup again"
                )
            if not told:
                told = True
                await run.progress(None, "waiting for the VM")
            await asyncio.sleep(_LOOK)

    async def _let_go(self, vm: VM, id: str) -> None:
        """Lets the content of a backup's checkpoint go, and removes those before it that were
        for the same repository: nothing counts from them any more. One that is still open is of
        another backup that is being made."""
        found = await self.environment.store.get(Checkpoint, id)
        if found is None:
            return
        checkpoint = found.record
        with contextlib.suppress(UndercroftError):  # the VM is being removed
            for older in await checkpoints_of(self.environment, vm.meta.id):
                if older.spec.owner != checkpoint.spec.owner or older.meta.id == id:
                    continue
                past = older.meta.created < checkpoint.meta.created
                if past and older.status.state is CheckpointState.RELEASED:
                    await self._ask(vm, older, remove=True)
            if checkpoint.status.state is CheckpointState.OPEN:
                await self._ask(vm, checkpoint, remove=False)

    async def _give_up(self, run: TaskRun) -> None:
        """Removes the checkpoint of a backup that did not come about."""
        making = await self.environment.store.get(Task, str(run.arguments.get("waits")))
        found = await self.environment.store.get(VM, run.task.spec.object.id)
        if found is None or making is None:
            return
        id = str(run.arguments["checkpoint"])
        with contextlib.suppress(UndercroftError):
            # It may just be being made, so this is asked of the actor, which does it after that.
            await self._checkpoints.give_up(SYSTEM, found.record.meta.id, id)

    async def _ask(self, vm: VM, checkpoint: Checkpoint, *, remove: bool) -> None:
        await self._checkpoints.release(SYSTEM, vm.meta.id, checkpoint.meta.id, remove=remove)

    # -- looking after them -----------------------------------------------------------------

    async def _verify(self, run: TaskRun) -> Done:
        repository = await asyncio.to_thread(_repository, run)
        wanted = [str(id) for id in run.arguments.get("backups", [])]
        async with reported(run) as report:

            def work(stop: Stop) -> tuple[dict[str, list[str]], int]:
                with repository.locked(stop, share=True):
                    backups, damaged = repository.list()
                    found = {
                        id: ["its manifest is damaged"]
                        for id in damaged
                        if not wanted or id in wanted
                    }
                    chosen = [b for b in backups if not wanted or b.id in wanted]
                    packs = repository.packs(fresh=True)
                    try:
                        for number, backup in enumerate(chosen):
                            note = partial(_part, report, number, len(chosen), backup)
                            if problems := verify(packs.get, backup, stop, note):
                                found[backup.id] = problems
                    finally:
                        packs.close()
                    return found, len(chosen)

            found, count = await in_thread(work)
        if found:
            raise DataCorruptError(
                damage(found, count),
                object=f"backup {next(iter(found))}",
                action="back up again with --full to another directory",
                damaged={id: problems[:20] for id, problems in list(found.items())[:50]},
            )
        return {"verified": count}, None

    async def _remove(self, run: TaskRun) -> Done:
        repository = await asyncio.to_thread(_repository, run)
        ids = [str(id) for id in run.arguments["backups"]]
        async with Held(repository, run):
            await run.commit()
            await run.progress(None, "freeing what nobody needs")

            def work(stop: Stop) -> int:
                for id in ids:
                    repository.remove(id)
                packs = repository.packs(write=True)
                try:
                    return sweep(repository, packs, stop)
                finally:
                    packs.close()

            try:
                freed = await in_thread(work)
            except OSError as error:
                raise DataError(
                    f"{repository.path} could not be tidied: {error.strerror or error}",
                    object=str(repository.path),
                    action="the backups are removed; make room, then: croft backup prune",
                ) from error
        return {"removed": ids, "freed": freed}, None


def damage(found: dict[str, list[str]], count: int) -> str:
    """What is wrong with the ``found`` ones (ids) of so many backups, in a sentence."""
    each = "; ".join(f"{id}: {problems[0]}" for id, problems in list(found.items())[:10])
    others = f"; and {len(found) - 10} others" if len(found) > 10 else ""
    return f"{len(found)} of {max(count, len(found))} backups are damaged: {each}{others}"


def _part(
    report: Callable[[float, str], None], number: int, count: int, backup: Backup, done: float
) -> None:
    report((number + done) / count, f"verifying {backup.id}")


def _repository(run: TaskRun) -> Repository:
    return Repository.open(Path(str(run.arguments["repository"])))
