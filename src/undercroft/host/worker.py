"""What carries out the tasks of an object other than a VM, one at a time: its queue is in its
record, so that the next daemon goes on where this one stopped."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Generic, TypeVar

import structlog

from undercroft.host.environment import Environment
from undercroft.host.outcome import TaskRun, finish, unexpected
from undercroft.model.errors import CancelledTaskError, UndercroftError
from undercroft.model.export import Export
from undercroft.model.image import Image
from undercroft.model.task import Task
from undercroft.model.volume import Volume

log = structlog.get_logger(__name__)

R = TypeVar("R", Image, Volume, Export)

RETRY_INTERVAL = 5.0  # seconds after a fault of our own before the same is tried again


@dataclass
class _Under:
    task_id: str
    work: asyncio.Task[None]
    committed: bool = False  # its outcome is being written: too late to cancel


class Worker(Generic[R]):
    """Carries out the tasks of one object. A subclass says how: `carry_out`, and `ended` for what
    failed or was cancelled; both `finish` the task."""

    kind: type[R]

    def __init__(self, environment: Environment, id: str) -> None:
        self.environment = environment
        self.id = id
        self._under: _Under | None = None
        self._following: asyncio.Task[None] | None = None
        self._cancelled: set[str] = set()

    async def carry_out(self, record: R, run: TaskRun) -> None:
        """Does a task and writes its outcome.

        Raises:
            UndercroftError: it did not work.
        """
        raise NotImplementedError

    async def ended(self, record: R, run: TaskRun, error: UndercroftError | None) -> None:
        """Writes that a task failed, or without an ``error`` was cancelled."""
        raise NotImplementedError

    def may_begin(self, record: R) -> bool:
        """Whether the first task of the queue can be begun."""
        return bool(record.tasks)

    def wake(self, record: R) -> None:
        """The record changed: begins its next task if none is under way."""
        if self._under is None and self.may_begin(record) and not self.environment.closing:
            task_id = record.tasks[0]
            work = asyncio.create_task(self._do(task_id), name=f"{self.kind.kind} {self.id}")
            self._under = _Under(task_id, work)
            work.add_done_callback(self._done)

    def cancel_task(self, task_id: str) -> None:
        """Stops a task: at once if it runs, else when its turn comes."""
        if task_id in self._cancelled:
            return  # a second time would cut short how it puts things back
        self._cancelled.add(task_id)
        under = self._under
        if under is not None and under.task_id == task_id and not under.committed:
            under.work.cancel()

    async def close(self) -> None:
        """Stops; what was under way is begun anew by the next daemon."""
        following = self._following
        for work in (following, self._under.work if self._under is not None else None):
            if work is not None:
                work.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await work

    def commit(self) -> None:
        """From here on the task is finished, whoever asks to cancel it."""
        if self._under is not None:
            self._under.committed = True

    def _done(self, work: asyncio.Task[None]) -> None:
        self._under = None
        error = None if work.cancelled() else work.exception()
        if error is not None:
            log.error("work failed", object=self.id, exc_info=error)
        if not self.environment.closing:
            pause = RETRY_INTERVAL if error is not None else 0.0
            self._following = asyncio.create_task(self._next(pause), name=f"next {self.id}")

    async def _next(self, pause: float) -> None:
        await asyncio.sleep(pause)
        found = await self.environment.store.get(self.kind, self.id)
        if found is not None:
            self._cancelled &= set(found.record.tasks)
            self.wake(found.record)

    async def _do(self, task_id: str) -> None:
        found = await self.environment.store.get(self.kind, self.id)
        entry = await self.environment.store.get(Task, task_id)
        if found is None:
            return
        record = found.record
        if entry is None or entry.record.status.state.final:
            await finish(self.environment, self.kind, self.id, task_id, change=lambda r: r)
            return
        run = TaskRun(self.environment, entry.record)
        try:
            if entry.record.spec.cancel or task_id in self._cancelled:
                raise CancelledTaskError("the task was cancelled")
            await run.begin()
            await self.carry_out(record, run)
        except (asyncio.CancelledError, CancelledTaskError):
            asked = task_id in self._cancelled or entry.record.spec.cancel
            if not asked or (self._under is not None and self._under.committed):
                raise  # the daemon is closing
            await self.ended(record, run, None)
        except UndercroftError as error:
            log.warning("task failed", task=task_id, object=record.label, error=error.message)
            await self.ended(record, run, error)
        except Exception as error:
            log.exception("task failed", task=task_id, object=record.label)
            await self.ended(record, run, unexpected(error, record))
