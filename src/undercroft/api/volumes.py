"""Volumes over REST, see `undercroft.operations.core`."""

from __future__ import annotations

from litestar import Controller, Response, get
from litestar.di import NamedDependency
from litestar.params import FromPath

from undercroft.api.answers import (
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    caller,
    errors,
    operations,
)
from undercroft.api.query import Query
from undercroft.model.volume import Volume


class VolumeController(Controller):
    """Looking at volumes; they come and go with their VMs."""

    path = "/v1/volumes"
    tags = ["volumes"]

    @get(operation_id="listVolumes", summary="List volumes", responses=errors(304))
    async def list_volumes(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Volume]]:
        """All volumes."""
        listing = await operations(request).volumes.list(caller(request))
        return answer_listing(request, Volume, listing, asked)

    @get(
        "/{ref:str}",
        operation_id="getVolume",
        summary="Show a volume",
        responses=errors(304, 404),
    )
    async def get_volume(self, request: AnyRequest, ref: FromPath[str]) -> Response[Volume]:
        """The volume with this name or id."""
        return answer_record(request, await operations(request).volumes.get(caller(request), ref))
