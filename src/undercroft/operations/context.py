"""What every operation works with, and the pieces that all of them share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from undercroft.model.base import Meta, Record, Ref
from undercroft.model.errors import BusyError, NotFoundError, StaleError
from undercroft.model.event import Event, EventLevel
from undercroft.model.export import Export
from undercroft.model.image import Image
from undercroft.model.names import is_id, new_id
from undercroft.model.task import Task, TaskSpec
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.services import HostServices
from undercroft.store.interface import Store, Versioned

R = TypeVar("R", bound=Record)

MAX_WAITING = 64  # tasks that may wait on one object
ATTEMPTS = 200  # tries of a transaction that others interfere with

_HINTS = {
    "vm": "see what exists with: croft ls",
    "image": "see what exists with: croft image ls",
    "volume": "see what exists with: croft volume ls",
    "template": "see what exists with: croft template ls",
    "export": "they are removed once they were fetched: export it again",
    "datastore": "see what exists with: croft datastore ls",
    "task": "see what exists with: croft task ls",
    "host": "see what exists with: croft host show",
}


@dataclass(frozen=True)
class Context:
    """Store, host and clock (seconds since 1970), handed to every group of operations."""

    store: Store
    host: str  # id of the host that this daemon is
    services: HostServices
    clock: Callable[[], float] = time.time


def scope(kind: str, project: str = "default") -> str:
    """The scope in which names of a kind are unique."""
    return f"{kind}/{project}"


def snapshot_scope(vm: str) -> str:
    """The scope in which the names of a VM's snapshots are unique."""
    return f"snapshot/{vm}"


async def find(store: Store, kind: type[R], ref: str, *, project: str = "default") -> Versioned[R]:
    """The object with this id or name.

    Raises:
        NotFoundError: there is none.
    """
    id: str | None = ref
    if not is_id(ref):
        # No name has other characters, and not every store could look for all of them.
        id = await store.resolve(scope(kind.kind, project), ref) if ref.isascii() else None
    found = await store.get(kind, id) if id is not None else None
    if found is None:
        raise NotFoundError(
            f"{kind.kind} {ref[:80]} not found",
            object=f"{kind.kind} {ref[:80]}",
            action=_HINTS.get(kind.kind),
        )
    return found


def check_unchanged(found: Versioned[Any], if_match: int | None) -> None:
    """Does nothing if the object is still at the revision that the caller saw.

    Raises:
        StaleError: it has been changed since.
    """
    if if_match is not None and found.revision != if_match:
        raise StaleError(
            f"{found.record.label} was changed meanwhile",
            object=found.record.label,
            action="look at it again, then repeat the change",
            expected=if_match,
            found=found.revision,
        )


def check_queue(record: VM | Image | Volume | Export) -> None:
    """Does nothing while the object's queue of tasks has room.

    Raises:
        BusyError: too many tasks wait already.
    """
    if len(record.tasks) >= MAX_WAITING:
        raise BusyError(
            f"{len(record.tasks)} tasks already wait on {record.label}",
            object=record.label,
            action="wait until some are done: croft task ls",
        )


def new_task(context: Context, verb: str, subject: Record | Ref, by: str, **arguments: Any) -> Task:
    """A task of this host's agent, ready to be written together with what it is about."""
    id = new_id("task")
    return Task(
        meta=Meta(id=id, name=id, created=context.clock()),
        spec=TaskSpec(
            verb=verb,
            object=subject if isinstance(subject, Ref) else Ref.to(subject),
            host=context.host,
            arguments=arguments,
            by=by,
        ),
    )


def new_event(
    now: float,
    type: str,
    subject: Record | Ref,
    message: str,
    *,
    by: str = "system",
    level: EventLevel = EventLevel.INFO,
    task: str | None = None,
    data: dict[str, Any] | None = None,
) -> Event:
    """An event about the given object."""
    id = new_id("event")
    return Event(
        meta=Meta(id=id, name=id, created=now),
        type=type,
        object=subject if isinstance(subject, Ref) else Ref.to(subject),
        message=message,
        level=level,
        by=by,
        task=task,
        data=data or {},
    )


async def pending(
    store: Store, record: VM | Image | Volume | Export, verbs: Sequence[str]
) -> Task | None:
    """The last waiting or running task of the object, if it is one of these verbs.

    Asking for the same thing twice gives the same task, so that a request can be repeated.
    """
    if not record.tasks:
        return None
    found = await store.get(Task, record.tasks[-1])
    if found is not None and found.record.spec.verb in verbs and not found.record.spec.cancel:
        return found.record
    return None
