"""How the agent writes down what became of things: status, outcome of tasks, events.

Each outcome is one transaction, so that a crash leaves either all of it or none.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import msgspec
import structlog

from undercroft.host.environment import Environment
from undercroft.model.base import Record
from undercroft.model.errors import (
    DataError,
    NoSpaceError,
    Problem,
    StaleError,
    UnavailableError,
    UndercroftError,
)
from undercroft.model.event import Event, EventLevel
from undercroft.model.export import Export
from undercroft.model.image import Image
from undercroft.model.task import Task, TaskState, TaskStatus
from undercroft.model.vm import VM, VMState
from undercroft.model.volume import Volume
from undercroft.operations.context import ATTEMPTS, new_event
from undercroft.store.interface import (
    Check,
    Delete,
    Put,
    Release,
    Transaction,
    Versioned,
    update,
)

R = TypeVar("R", VM, Image, Volume, Export)

log = structlog.get_logger(__name__)

PROGRESS_INTERVAL = 0.5  # seconds between two writes of progress
COMMITTED = "committed"
RETRY_INTERVAL = 1.0  # seconds between two tries to write down what happened


def change_status(record: VM, **values: Any) -> VM:
    """The VM with other values in its status. One that is being removed stays so, whatever else
    becomes of it."""
    if record.status.state is VMState.REMOVING:
        values.pop("state", None)
    return msgspec.structs.replace(record, status=msgspec.structs.replace(record.status, **values))


def change_spec(record: VM, **values: Any) -> VM:
    """The VM with other values in its spec: only to settle what a guest or a failure decided."""
    return msgspec.structs.replace(record, spec=msgspec.structs.replace(record.spec, **values))


async def write(
    environment: Environment,
    kind: type[R],
    id: str,
    change: Callable[[R], R | None],
    events: Callable[[R], Sequence[Event]] | None = None,
) -> R | None:
    """Applies ``change`` to the record, with the events that tell of it; None if it is gone."""
    store = environment.store
    for _ in range(ATTEMPTS):
        found = await store.get(kind, id)
        if found is None:
            return None
        wanted = change(found.record)
        if wanted is None or wanted == found.record:
            return found.record
        told: Sequence[Event] = events(wanted) if events is not None else ()
        try:
            await store.transact(
                Transaction(
                    checks=[Check(kind, id, found.revision)],
                    puts=[Put(wanted), *(Put(event) for event in told)],
                )
            )
        except StaleError:
            continue
        return wanted
    raise StaleError(f"{kind.kind} {id} keeps changing", object=f"{kind.kind} {id}")


class TaskRun:
    """A task being carried out: where its progress, checkpoint and outcome are written.

    ``committed``: it is past the point where it could be undone, and is finished even if somebody
    asks to cancel it.
    """

    def __init__(self, environment: Environment, task: Task) -> None:
        self.environment = environment
        self.task = task
        self.committed = bool(task.status.checkpoint.get(COMMITTED))
        self.hurry = asyncio.Event()
        """Set once somebody wants it over: what can be left for another time is."""
        self._written = 0.0
        self._phase = task.status.phase

    @property
    def id(self) -> str:
        """The task's id."""
        return self.task.meta.id

    @property
    def arguments(self) -> dict[str, Any]:
        """The task's arguments."""
        return self.task.spec.arguments

    async def begin(self) -> None:
        """Writes that the task runs."""
        await self._status(state=TaskState.RUNNING, started=self.environment.clock())

    async def progress(self, fraction: float | None, phase: str) -> None:
        """Writes how far it is; at most every `PROGRESS_INTERVAL` unless the phase changes."""
        now = time.monotonic()
        if phase == self._phase and now - self._written < PROGRESS_INTERVAL:
            return
        self._written, self._phase = now, phase
        await self._status(progress=fraction, phase=phase)

    async def commit(self) -> None:
        """Writes that it cannot be undone any more: so the next daemon, too, will finish it."""
        self.committed = True
        await self.checkpoint(**{COMMITTED: True})

    async def checkpoint(self, **values: Any) -> None:
        """Writes what must be known to carry on after a crash."""
        await self._status(checkpoint={**self.task.status.checkpoint, **values})

    async def _status(self, **values: Any) -> None:
        def change(task: Task) -> Task:
            if task.status.state.final:
                return task
            return msgspec.structs.replace(
                task, status=msgspec.structs.replace(task.status, **values)
            )

        written = await update(self.environment.store, Task, self.id, change)
        if written is not None:
            self.task = written.record


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Does something that is not to be left half done, also if it is cancelled meanwhile."""
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait({doing})
        if not doing.cancelled():
            doing.exception()  # seen
        raise


async def unless_hurried(run: TaskRun, work: Coroutine[Any, Any, None]) -> None:
    """Does something that can be left for another time, and leaves it (by cancelling it) when the
    task is to be over.

    Raises:
        Exception: what the work raised.
    """
    doing, hurry = asyncio.ensure_future(work), asyncio.ensure_future(run.hurry.wait())
    try:
        await asyncio.wait({doing, hurry}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        hurry.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.wait({doing})
    if not doing.cancelled():
        doing.result()


def unexpected(error: Exception, record: Record) -> UndercroftError:
    """What no code of ours foresaw, as an error that can be told."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpaceError(
            f"the disk that holds {error.filename or 'the data directory'} is full",
            object=record.label,
            action="make room (croft image rm, croft rm), then try again",
        )
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        return DataError(what, object=record.label)
    return UndercroftError(
        f"{type(error).__name__}: {error}",
        object=record.label,
        action="this is a fault of Undercroft's own; the daemon's log has the details",
    )


def final_status(
    task: Task,
    now: float,
    error: UndercroftError | None,
    cancelled: bool,
    result: dict[str, Any] | None,
) -> Task:
    """The task in its final state."""
    state = TaskState.SUCCEEDED
    problem: Problem | None = None
    if cancelled:
        state = TaskState.CANCELLED
    elif error is not None:
        state, problem = TaskState.FAILED, _plain(error.problem())
    status: TaskStatus = msgspec.structs.replace(
        task.status,
        state=state,
        progress=1.0 if state is TaskState.SUCCEEDED else task.status.progress,
        phase="" if state is TaskState.SUCCEEDED else task.status.phase,
        started=task.status.started or now,
        finished=now,
        error=problem,
        result=result or {},
    )
    return msgspec.structs.replace(task, status=status)


def _plain(problem: Problem) -> Problem:
    """The problem with nothing in its data that could not be written down."""
    data = msgspec.to_builtins(problem.data, enc_hook=str, str_keys=True)
    return msgspec.structs.replace(problem, data=data)


async def finish(
    environment: Environment,
    kind: type[R],
    id: str,
    task_id: str,
    *,
    change: Callable[[R], R | None],
    error: UndercroftError | None = None,
    cancelled: bool = False,
    result: dict[str, Any] | None = None,
    event: tuple[str, str, EventLevel] | None = None,
    extra: Callable[[R], tuple[Sequence[Put], Sequence[Delete], Sequence[Release]]] | None = None,
) -> R | None:
    """Writes a task's outcome, what it made of its object, and an event, all at once.

    ``change`` gets the object without the task in its queue; None removes the object, and ends the
    tasks that still wait for it. ``event`` is type, message and level. What happened cannot be
    undone by a store that does not take it, so it is tried again until it does. Returns the object
    as written, or None if it is gone.
    """
    store = environment.store
    now = environment.clock()
    attempts = ATTEMPTS
    while attempts:
        task = await store.get(Task, task_id)
        found: Versioned[R] | None = await store.get(kind, id)
        checks: list[Check] = []
        puts: list[Put] = []
        deletes: list[Delete] = []
        releases: list[Release] = []
        by = "system"
        if task is not None and not task.record.status.state.final:
            checks.append(Check(Task, task_id, task.revision))
            puts.append(Put(final_status(task.record, now, error, cancelled, result)))
            by = task.record.spec.by
        wanted: R | None = None
        if found is not None:
            queue = tuple(t for t in found.record.tasks if t != task_id)
            record = msgspec.structs.replace(found.record, tasks=queue)
            wanted = change(record)
            checks.append(Check(kind, id, found.revision))
            if wanted is None:
                deletes.append(Delete(kind, id))
                await _end_waiting(environment, queue, now, checks, puts)
            else:
                puts.append(Put(wanted))
            if extra is not None:
                more = extra(record)
                puts += more[0]
                deletes += more[1]
                releases += more[2]
            if event is not None and not _is_nobodys(record):
                type_, message, level = event
                puts.append(
                    Put(new_event(now, type_, record, message, by=by, level=level, task=task_id))
                )
        try:
            await store.transact(
                Transaction(checks=checks, puts=puts, deletes=deletes, releases=releases)
            )
        except StaleError:
            attempts -= 1
            continue
        except (NoSpaceError, UnavailableError) as refusal:
            if environment.closing:
                raise
            log.error("writing an outcome failed", task=task_id, error=refusal.message)
            await asyncio.sleep(RETRY_INTERVAL)
            continue
        return wanted
    raise StaleError(f"{kind.kind} {id} keeps changing", object=f"{kind.kind} {id}")


def _is_nobodys(record: Record) -> bool:
    """Whether what happens to it is no news."""
    return isinstance(record, VM) and record.spec.passing


async def _end_waiting(
    environment: Environment,
    queue: Sequence[str],
    now: float,
    checks: list[Check],
    puts: list[Put],
) -> None:
    """Adds to a transaction the end of tasks whose object is about to be gone: who wanted that has
    it, the others are cancelled."""
    for id in queue:
        waiting = await environment.store.get(Task, id)
        if waiting is None or waiting.record.status.state.final:
            continue
        cancelled = not waiting.record.spec.verb.endswith(".remove")
        checks.append(Check(Task, id, waiting.revision))
        puts.append(Put(final_status(waiting.record, now, None, cancelled, None)))
