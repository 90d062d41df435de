"""Events, and everything else that changes, over REST and as streams."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, cast

import msgspec
from litestar import Controller, Response, get
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter
from litestar.response.base import ASGIResponse

from undercroft.api.answers import AnyRequest, PageOf, caller, errors, operations
from undercroft.api.streams import EVENT_STREAM, Follower, Streaming
from undercroft.model.base import Record
from undercroft.model.errors import InvalidError
from undercroft.model.event import Event
from undercroft.store.interface import Changes
from undercroft.store.kinds import KINDS

MAX_EVENTS = 1000
AFTER = QueryParameter(
    name="after", required=False, description="Only what happened after this revision."
)
OBJECT = QueryParameter(
    name="object", required=False, description="Only events about the object with this name or id."
)
EVENTS = QueryParameter(
    name="limit",
    required=False,
    description=f"At most so many: 1 to {MAX_EVENTS}. The first ones after `after`, or without it "
    "the newest.",
)
LAST_EVENT_ID = HeaderParameter(
    name="Last-Event-ID",
    required=False,
    description="The id of the last event that was seen: the stream continues behind it.",
)
WATCHED = QueryParameter(
    name="kinds",
    required=False,
    description=f"Kinds of records, separated by commas: {', '.join(KINDS)}. By default all.",
)
FROM = QueryParameter(
    name="from",
    required=False,
    description="Every change after this revision; by default from now on.",
)
ID = QueryParameter(name="id", required=False, description="Only the record with this id.")


class WatchChange(msgspec.Struct, frozen=True, kw_only=True):
    """A record as it was written by ``revision``; null: it was removed."""

    kind: str
    id: str
    revision: int
    record: Any


def _stream_of(container: Any, description: str) -> dict[int, ResponseSpec]:
    ok = ResponseSpec(
        data_container=container,
        description=description,
        media_type=cast(Any, EVENT_STREAM),
        generate_examples=False,
    )
    return {200: ok, **errors(410)}


class EventController(Controller):
    """What happened, and what happens."""

    path = "/v1"
    tags = ["events"]

    @get("/events", operation_id="listEvents", summary="List events", responses=errors())
    async def list_events(
        self,
        request: AnyRequest,
        after: Annotated[int | None, AFTER] = None,
        limit: Annotated[int | None, EVENTS] = None,
        object: Annotated[str | None, OBJECT] = None,
    ) -> Response[PageOf[Event]]:
        """The first events after a revision, or else the newest; oldest first."""
        if limit is not None and not 1 <= limit <= MAX_EVENTS:
            raise InvalidError(f"limit {limit} is not possible", action=f"choose 1 to {MAX_EVENTS}")
        listing = await operations(request).events.list(
            caller(request), _revision(after, "after") or 0, limit or 100, object
        )
        page = PageOf(items=[item.record for item in listing.items], revision=listing.revision)
        return Response(content=page, media_type="application/json")

    @get(
        "/events/stream",
        operation_id="followEvents",
        summary="Follow events",
        media_type=EVENT_STREAM,
        responses=_stream_of(Event, "Server-sent events: each `data` is an event."),
    )
    async def follow_events(
        self,
        request: AnyRequest,
        after: Annotated[int | None, AFTER] = None,
        object: Annotated[str | None, OBJECT] = None,
        last_event_id: Annotated[str | None, LAST_EVENT_ID] = None,
    ) -> ASGIResponse:
        """Events as they happen, from a revision or from now on, as server-sent events whose ids
        are revisions. The first has the name `start` and tells the revision it begins at; one named
        `error` is a problem, and the last."""
        caller(request).require("event.view")

        def render(changes: Changes) -> list[bytes]:
            found = (change.record for change in changes.changes)
            return [
                msgspec.json.encode(event)
                for event in found
                if isinstance(event, Event)
                and (object is None or object in (event.object.id, event.object.name))
            ]

        return await _follow(request, [Event], _position(last_event_id, after, "after"), render)

    @get(
        "/watch",
        operation_id="watch",
        summary="Follow all changes",
        media_type=EVENT_STREAM,
        responses=_stream_of(WatchChange, "Server-sent events: each `data` is a change."),
    )
    async def watch(
        self,
        request: AnyRequest,
        kinds: Annotated[str | None, WATCHED] = None,
        from_: Annotated[int | None, FROM] = None,
        id: Annotated[str | None, ID] = None,
        last_event_id: Annotated[str | None, LAST_EVENT_ID] = None,
    ) -> ASGIResponse:
        """Every record that is written or removed, in order and without gaps. All changes of one
        transaction have the same revision; only the last of them carries it as id. Begins with an
        event named `start`. 410: list again, and watch from the revision of the listing."""
        wanted = _kinds(kinds)
        for kind in wanted:
            caller(request).require(f"{kind.kind}.view")

        def render(changes: Changes) -> list[bytes]:
            return [
                msgspec.json.encode(
                    WatchChange(
                        kind=change.kind.kind,
                        id=change.id,
                        revision=change.revision,
                        record=change.record,
                    )
                )
                for change in changes.changes
                if id is None or change.id == id
            ]

        return await _follow(request, wanted, _position(last_event_id, from_, "from"), render)


async def _follow(
    request: AnyRequest,
    kinds: list[type[Record]],
    position: int | None,
    render: Callable[[Changes], list[bytes]],
) -> ASGIResponse:
    store = operations(request).store
    revision = await store.revision() if position is None else position
    source: AsyncIterator[Changes] = store.watch(kinds, revision)
    follower = Follower(source, render, request.app.state["stopping"], revision)
    await follower.prepare()
    return Streaming(aiter(follower), EVENT_STREAM)


def _kinds(text: str | None) -> list[type[Record]]:
    if text is None:
        return list(KINDS.values())
    names = dict.fromkeys(part.strip() for part in text.split(","))
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise InvalidError(
            f"{unknown[0][:40]!r} is not a kind of record", action=f"choose of {', '.join(KINDS)}"
        )
    return [KINDS[name] for name in names]


def _position(last_event_id: str | None, revision: int | None, name: str) -> int | None:
    """Where a stream begins; a client that comes back by itself knows best."""
    if last_event_id:
        if not last_event_id.isascii() or not last_event_id.isdigit() or len(last_event_id) > 18:
            raise InvalidError(f"Last-Event-ID {last_event_id[:40]!r} is not a revision")
        return int(last_event_id)
    return _revision(revision, name)


def _revision(revision: int | None, name: str) -> int | None:
    if revision is not None and not 0 <= revision < 1 << 62:
        raise InvalidError(f"{name} {revision} is not a revision")
    return revision
