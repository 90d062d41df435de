"""What handlers share: who asks, what answers, and how records and listings leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, TypeVar, cast

import msgspec
from litestar import Request, Response
from litestar.connection import ASGIConnection
from litestar.di import Provide
from litestar.handlers import BaseRouteHandler
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import HeaderParameter, QueryParameter
from litestar.typing import FieldDefinition

from undercroft.api.query import DEFAULT_LIMIT, MAX_LIMIT, Query, run_query
from undercroft.model.base import Record
from undercroft.model.errors import InvalidError, Problem
from undercroft.model.requests import TaskList
from undercroft.model.task import Task
from undercroft.operations.access import Caller
from undercroft.operations.core import Operations
from undercroft.store.interface import Listing, Versioned

T = TypeVar("T")
R = TypeVar("R", bound=Record)
Connection = ASGIConnection[Any, Any, Any, Any]
AnyRequest = Request[Any, Any, Any]


class PageOf(msgspec.Struct, Generic[T], frozen=True, kw_only=True):
    """A page of a listing: ``revision`` is that of the listing, ``next`` the cursor of the next
    page (null: this is the last). With ``fields`` the items have only these."""

    items: list[T]
    revision: int
    next: str | None = None


FILTER = QueryParameter(
    name="filter",
    required=False,
    description="Conditions that must all hold, separated by commas: PATH OPERATOR VALUE, with the "
    "operators == != < <= > >= and ~ !~ for shell patterns. A value with commas stands in double "
    'quotes; null is what is not there. For instance status.state==running,meta.name~"web*".',
)
SORT = QueryParameter(
    name="sort",
    required=False,
    description="Paths separated by commas, each with - in front for descending order. "
    "By default objects are in order of their ids.",
)
LIMIT = QueryParameter(
    name="limit",
    required=False,
    description=f"At most so many items: 1 to {MAX_LIMIT}, by default {DEFAULT_LIMIT}.",
)
CURSOR = QueryParameter(
    name="cursor",
    required=False,
    description="The `next` of the page before, with the same query.",
)
FIELDS = QueryParameter(
    name="fields",
    required=False,
    description="Only these paths of each object, for instance meta.name,status.state.",
)
IF_MATCH = HeaderParameter(
    name="If-Match",
    required=False,
    description="The ETag of the object as it was read: the change is refused with 412 if it has "
    "changed since.",
)
FORCE = QueryParameter(name="force", required=False, description="Also if it is in use.")


def read_query(
    filter: Annotated[str | None, FILTER] = None,
    sort: Annotated[str | None, SORT] = None,
    limit: Annotated[int | None, LIMIT] = None,
    cursor: Annotated[str | None, CURSOR] = None,
    fields: Annotated[str | None, FIELDS] = None,
) -> Query:
    """What is asked of a listing, for every handler that has a parameter ``asked``."""
    return Query(filter, sort, limit, cursor, fields)


SHARED = {"asked": Provide(read_query, sync_to_thread=False)}


def fields_of(handler: BaseRouteHandler) -> list[FieldDefinition]:
    """What a handler takes from a request, with that of the `SHARED` it asks for in their place."""
    fields: list[FieldDefinition] = []
    for name, field in handler.parsed_fn_signature.parameters.items():
        if name in SHARED:
            fields += SHARED[name].parsed_fn_signature.parameters.values()
        else:
            fields.append(field)
    return fields


def operations(connection: Connection) -> Operations:
    """The operations of the daemon."""
    return cast(Operations, connection.app.state["operations"])


def caller(connection: Connection) -> Caller:
    """Who asks; `undercroft.api.gate` has found out."""
    return cast(Caller, connection.scope["state"]["caller"])


def etag(revision: int) -> str:
    """The entity tag of what was written by a revision."""
    return f'"{revision}"'


def answer_record(request: AnyRequest, found: Versioned[R]) -> Response[R]:
    """An object with its ETag, or 304 if the caller has it already."""
    tag = etag(found.revision)
    if tag in _known(request):
        return Response(content=cast(R, None), status_code=304, headers={"etag": tag})
    return Response(
        content=found.record,
        media_type="application/json",
        headers={"etag": tag, "cache-control": "no-cache"},
    )


def answer_listing(
    request: AnyRequest, kind: type[R], listing: Listing[R], query: Query
) -> Response[PageOf[R]]:
    """The page of a listing that was asked for, or 304."""
    page = run_query(kind, listing, query)
    tag = f'W/"{listing.revision}"'
    if tag in _known(request):
        return Response(content=cast(PageOf[R], None), status_code=304, headers={"etag": tag})
    return Response(
        content=cast(PageOf[R], page),
        media_type="application/json",
        headers={"etag": tag, "cache-control": "no-cache"},
    )


def _known(request: AnyRequest) -> tuple[str, ...]:
    for name, value in request.scope["headers"]:
        if name == b"if-none-match":
            return tuple(tag.strip() for tag in value.decode("latin-1").split(","))
    return ()


def answer_task(task: Task) -> Response[Task]:
    """A task that has been accepted: 202 and where to follow it."""
    return Response(
        content=task,
        status_code=202,
        media_type="application/json",
        headers={"location": f"/v1/tasks/{task.meta.id}"},
    )


def answer_tasks(tasks: Sequence[Task]) -> Response[TaskList]:
    """Tasks that have been accepted: 202."""
    return Response(
        content=TaskList(tasks=tuple(tasks)), status_code=202, media_type="application/json"
    )


def parse_if_match(text: str | None) -> int | None:
    """The revision of an If-Match header; None if there is none, or ``*``.

    Raises:
        InvalidError: it is not an ETag of this API.
    """
    if text is None or text.strip() == "*":
        return None
    digits = text.strip().removeprefix("W/").strip('"')
    if not digits.isascii() or not digits.isdigit() or len(digits) > 18:
        raise InvalidError(
            f"If-Match {text[:60]!r} is not an ETag of this API",
            action='send the ETag of the object as it came, for instance "42"',
        )
    return int(digits)


_MEANING = {
    304: "Not changed since (If-None-Match).",
    400: "The request makes no sense; the message names the part that is wrong.",
    401: "The caller is not known.",
    403: "The caller lacks the privilege.",
    404: "There is no such object.",
    409: "The present state does not allow it.",
    410: "History that far back is gone.",
    412: "It was changed meanwhile (If-Match).",
    413: "The request is too large.",
    501: "This host cannot do it.",
    502: "QEMU, or the guest, failed.",
    503: "It cannot be reached now.",
    504: "It took too long.",
    507: "A disk is full.",
}


def errors(*statuses: int) -> dict[int, ResponseSpec]:
    """What a handler documents besides success; 400, 401, 403 and 500 go without saying."""
    return {
        status: ResponseSpec(
            data_container=Problem,
            description=_MEANING[status],
            media_type=cast(Any, "application/problem+json"),
            generate_examples=False,
        )
        for status in sorted({400, 401, 403, *statuses})
    }
