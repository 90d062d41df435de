"""The application: all routes, and how errors leave it."""

from __future__ import annotations

import asyncio
from typing import Any

from litestar import Litestar, Response, get
from litestar.datastructures import State
from litestar.handlers import BaseRouteHandler
from litestar.params import QueryParameter
from litestar.types import ControllerRouterHandler

from undercroft.api.answers import SHARED, AnyRequest, fields_of
from undercroft.api.backups import BackupController
from undercroft.api.body import MAX_BODY, StrictJSON
from undercroft.api.cdroms import CdromController
from undercroft.api.checkpoints import CheckpointController
from undercroft.api.consoles import console, console_page, vnc, vnc_page
from undercroft.api.datastores import DatastoreController
from undercroft.api.events import EventController
from undercroft.api.exports import ExportController
from undercroft.api.guests import GuestController
from undercroft.api.hosts import HostController
from undercroft.api.images import ImageController
from undercroft.api.imports import ImportController, UploadController
from undercroft.api.problems import answer_problem
from undercroft.api.snapshots import SnapshotController
from undercroft.api.statistics import Statistics
from undercroft.api.system import health, metrics, version
from undercroft.api.tasks import TaskController
from undercroft.api.templates import TemplateController
from undercroft.api.vms import VMController
from undercroft.api.volumes import VolumeController, layers
from undercroft.model.errors import InvalidError
from undercroft.operations.core import Operations


@get("/v1/openapi.json", include_in_schema=False)
async def openapi(request: AnyRequest) -> Response[bytes]:
    """The description of this API."""
    state = request.app.state
    if state.get("openapi") is None:
        from undercroft.api.openapi import describe

        state["openapi"] = await asyncio.to_thread(describe, request.app)
    return Response(content=state["openapi"], media_type="application/json")


ROUTES: list[ControllerRouterHandler] = [
    version,
    health,
    metrics,
    VMController,
    CdromController,
    SnapshotController,
    CheckpointController,
    BackupController,
    TemplateController,
    GuestController,
    console,
    console_page,
    vnc,
    vnc_page,
    ImageController,
    ExportController,
    ImportController,
    UploadController,
    VolumeController,
    DatastoreController,
    layers,
    TaskController,
    EventController,
    HostController,
]


def create_app(
    operations: Operations,
    *,
    data: str = "",
    stopping: asyncio.Event | None = None,
    statistics: Statistics | None = None,
) -> Litestar:
    """The API over these operations; `undercroft.api.gate` belongs in front of it.

    ``data`` is the path of the data directory. Streams and consoles end when ``stopping`` is set.
    """
    state = {
        "operations": operations,
        "data": data,
        "stopping": stopping or asyncio.Event(),
        "statistics": statistics or Statistics(),
    }
    return Litestar(
        [*ROUTES, openapi],
        state=State(state, deep_copy=False),
        dependencies=SHARED,
        dto=StrictJSON,
        return_dto=None,
        before_request=refuse_unknown_parameters,
        exception_handlers={Exception: answer_problem},
        request_max_body_size=MAX_BODY,
        openapi_config=None,
        logging_config=None,
        debug=False,
        pdb_on_exception=False,
    )


async def refuse_unknown_parameters(request: AnyRequest) -> None:
    """A misspelt parameter must not be ignored: ``?forse=true`` is not what it looks like.

    Raises:
        InvalidError: the query has a parameter that this route does not know.
    """
    if not request.scope["query_string"]:
        return
    known = _parameters(request.route_handler)
    for name in request.query_params:
        if name not in known:
            raise InvalidError(
                f"there is no parameter {name[:60]!r} here",
                action=f"choose of {', '.join(sorted(known))}" if known else "leave it away",
                parameter=name[:60],
            )


def _parameters(handler: BaseRouteHandler) -> frozenset[str]:
    known: frozenset[str] | None = handler.opt.get("query")
    if known is None:
        wanted: list[Any] = [field.kwarg_definition for field in fields_of(handler)]
        known = frozenset(
            parameter.name
            for parameter in wanted
            if isinstance(parameter, QueryParameter) and parameter.name
        )
        handler.opt["query"] = known
    return known
