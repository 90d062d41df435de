"""The typed client: the operations of a daemon, called from another process.

Every method raises the errors of `undercroft.model.errors` just as the operation does, and besides
`DaemonError` (nobody answers) and `TimeLimitError`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, Self, TypeVar

from undercroft.client.backups import BackupsClient, CheckpointsClient
from undercroft.client.connect import Endpoint
from undercroft.client.datastores import DatastoresClient
from undercroft.client.decode import convert, decode
from undercroft.client.exports import ExportsClient
from undercroft.client.images import ImagesClient
from undercroft.client.imports import ImportsClient
from undercroft.client.noun import Noun, Versioned
from undercroft.client.raw import Raw
from undercroft.client.snapshots import SnapshotsClient
from undercroft.client.streams import follow
from undercroft.client.templates import TemplatesClient
from undercroft.client.transport import TIMEOUT
from undercroft.client.vms import VMsClient
from undercroft.client.volumes import VolumesClient
from undercroft.model.base import Record
from undercroft.model.checkpoint import Checkpoint
from undercroft.model.datastore import Datastore
from undercroft.model.errors import CompactedError, TimeLimitError, error_from_problem
from undercroft.model.event import Event
from undercroft.model.export import Export
from undercroft.model.host import Host
from undercroft.model.image import Image
from undercroft.model.requests import CheckReport, VersionInfo
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume

__all__ = ["Change", "Client", "Versioned"]

R = TypeVar("R", bound=Record)
_KINDS: tuple[type[Record], ...] = (
    VM,
    Volume,
    Datastore,
    Snapshot,
    Checkpoint,
    Template,
    Image,
    Export,
    Task,
    Event,
    Host,
)
_RECORDS = {cls.kind: cls for cls in _KINDS}
_LONG_POLL = 20.0  # seconds


class Change(NamedTuple, Generic[R]):
    """A record as it was written at ``revision``; None: it was removed."""

    kind: str
    id: str
    revision: int
    record: R | None


class Client:
    """A daemon, spoken to from outside. Not for use by several threads at once.

    ``raw`` is the same connection with plain dicts.
    """

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT) -> None:
        self.raw = Raw(endpoint, timeout)
        self.vms = VMsClient(self.raw)
        self.images = ImagesClient(self.raw)
        self.exports = ExportsClient(self.raw)
        self.imports = ImportsClient(self.raw)
        self.snapshots = SnapshotsClient(self.raw)
        self.checkpoints = CheckpointsClient(self.raw)
        self.backups = BackupsClient(self.raw)
        self.templates = TemplatesClient(self.raw)
        self.datastores = DatastoresClient(self.raw)
        self.volumes = VolumesClient(self.raw)
        self.tasks = TasksClient(self.raw)
        self.events = EventsClient(self.raw)
        self.hosts = HostsClient(self.raw)

    def version(self) -> VersionInfo:
        """What answers."""
        return decode(self.raw.request("GET", "/v1").read(), VersionInfo)

    def watch(
        self,
        *kinds: str,
        from_revision: int | None = None,
        id: str | None = None,
        patience: float = 30.0,
    ) -> Iterator[Change[Any]]:
        """Every change of records of these kinds (all, if none is given) after a revision, or from
        now on; of one object only, if ``id`` is given. Never ends by itself; survives a restart of
        the daemon of up to ``patience`` seconds.

        Raises:
            CompactedError: history that far back is gone: list, then watch from there.
        """
        return watch(self.raw, kinds, from_revision, id, patience)

    def close(self) -> None:
        """Ends the connection."""
        self.raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def watch(
    raw: Raw,
    kinds: tuple[str, ...],
    from_revision: int | None,
    id: str | None,
    patience: float,
) -> Iterator[Change[Any]]:
    """See `Client.watch`."""
    params: dict[str, object] = {"kinds": kinds or None, "from": from_revision, "id": id}
    for message in follow(raw, "/v1/watch", params, "from", patience):
        if message.event != "message":
            continue
        fields = decode(message.data.encode(), dict[str, Any])
        cls = _RECORDS.get(fields["kind"])
        if cls is None:
            continue  # a kind that only a newer server knows
        record = fields["record"]
        yield Change(
            fields["kind"],
            fields["id"],
            fields["revision"],
            None if record is None else convert(record, cls),
        )


class TasksClient(Noun[Task]):
    """Tasks, see `undercroft.operations.tasks`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/tasks", Task)

    def cancel(self, id: str) -> Task:
        """Asks the task to stop; whether it did is seen in its state."""
        return decode(self._request("POST", id, "/cancel"), Task)

    def wait(
        self,
        task: Task | str,
        timeout: float | None = None,
        progress: Callable[[Task], None] | None = None,
        check: bool = True,
    ) -> Task:
        """Waits until a task is final and returns it. ``progress`` is called at every change.

        Raises:
            TimeLimitError: it was not final within ``timeout`` seconds.
            UndercroftError: with ``check``, what the task failed with; `CancelledTaskError` too.
        """
        id = task if isinstance(task, str) else task.meta.id
        deadline = None if timeout is None else time.monotonic() + timeout
        if progress is None:
            final = self._poll(id, deadline)
        else:
            final = self._follow(id, deadline, progress)
        if check and final.status.error is not None:
            raise error_from_problem(final.status.error)
        return final

    def _poll(self, id: str, deadline: float | None) -> Task:
        while True:
            seconds = _LONG_POLL
            if deadline is not None:
                seconds = max(0.0, min(seconds, deadline - time.monotonic()))
            task = decode(self._request("GET", id, params={"wait": f"{seconds:.3f}"}), Task)
            if task.status.state.final:
                return task
            _check_deadline(task, deadline)

    def _follow(self, id: str, deadline: float | None, progress: Callable[[Task], None]) -> Task:
        while True:
            task, revision = self.get_versioned(id)
            progress(task)
            if task.status.state.final:
                return task
            _check_deadline(task, deadline)
            try:
                for change in watch(self._raw, ("task",), revision, id, 30.0):
                    if not isinstance(change.record, Task):
                        break  # removed: the next get() says so
                    task = change.record
                    progress(task)
                    if task.status.state.final:
                        return task
                    _check_deadline(task, deadline)
            except CompactedError:
                continue


def _check_deadline(task: Task, deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise TimeLimitError(
            f"{task.spec.verb} of {task.spec.object.kind} {task.spec.object.name} is not done yet",
            object=task.label,
            action=f"it goes on; follow it with 'croft task wait {task.meta.id}'",
        )


class EventsClient:
    """Events, see `undercroft.operations.events`."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    def list(self, after: int = 0, limit: int = 100, object: str | None = None) -> Sequence[Event]:
        """The last ``limit`` events after a revision, oldest first; of one object, if given."""
        page = self._raw.get("/v1/events", {"after": after, "limit": limit, "object": object})
        return [convert(item, Event) for item in page["items"]]

    def follow(self, after: int | None = None, object: str | None = None) -> Iterator[Event]:
        """Events as they happen, from a revision or from now on. Never ends by itself."""
        params = {"after": after, "object": object}
        for message in follow(self._raw, "/v1/events/stream", params, "after"):
            if message.event == "message":
                yield decode(message.data.encode(), Event)


class HostsClient(Noun[Host]):
    """Hosts, see `undercroft.operations.hosts`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/hosts", Host)

    def check(self, repair: bool = False) -> CheckReport:
        """Looks for what a crash left behind; with ``repair`` puts it right."""
        body = self._request("POST", "self", "/check", json={"repair": repair}, timeout=600.0)
        return decode(body, CheckReport)

    def check_volumes(self, repair: bool = False) -> CheckReport:
        """Looks for what is wrong with volumes; with ``repair`` puts it right."""
        body = self._request(
            "POST", "self", "/volumes/check", json={"repair": repair}, timeout=3600.0
        )
        return decode(body, CheckReport)
