"""How the agent writes down what became of things: status, outcome of tasks, events.

Each outcome is one transaction, so that a crash leaves either all of it or none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from undercroft.host.environment import Environment
from undercroft.model.errors import Problem, StaleError, UndercroftError
from undercroft.model.event import Event, EventLevel
from undercroft.model.image import Image
from undercroft.model.task import Task, TaskState, TaskStatus
from undercroft.model.vm import VM
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

R = TypeVar("R", VM, Image)

PROGRESS_INTERVAL = 0.5  # seconds between two writes of progress


def change_status(record: VM, **values: Any) -> VM:
    """The VM with other values in its status."""
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
    """A task being carried out: where its progress, checkpoint and outcome are written."""

    def __init__(self, environment: Environment, task: Task) -> None:
        self.environment = environment
        self.task = task
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

    async def checkpoint(self, **values: Any) -> None:
        """Writes what must be known to carry on after a crash."""
        await self._status(checkpoint={**self.task.status.checkpoint, **values})

    async def _status(self, **values: Any) -> None:
        def change(task: Task) -> Task:
            return msgspec.structs.replace(
                task, status=msgspec.structs.replace(task.status, **values)
            )

        written = await update(self.environment.store, Task, self.id, change)
        if written is not None:
            self.task = written.record


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
        state, problem = TaskState.FAILED, error.problem()
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

    ``change`` gets the object without the task in its queue; None removes the object. ``event`` is
    type, message and level. Returns the object as written, or None if it is gone.
    """
    store = environment.store
    now = environment.clock()
    for _ in range(ATTEMPTS):
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
            else:
                puts.append(Put(wanted))
            if extra is not None:
                more = extra(record)
                puts += more[0]
                deletes += more[1]
                releases += more[2]
            if event is not None:
                type_, message, level = event
                puts.append(
                    Put(new_event(now, type_, record, message, by=by, level=level, task=task_id))
                )
        try:
            await store.transact(
                Transaction(checks=checks, puts=puts, deletes=deletes, releases=releases)
            )
        except StaleError:
            continue
        return wanted
    raise StaleError(f"{kind.kind} {id} keeps changing", object=f"{kind.kind} {id}")
