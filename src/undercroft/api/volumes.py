"""Volumes over REST, see `undercroft.operations.core`."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, Response, get
from litestar.params import FromPath

from undercroft.api.answers import (
    CURSOR,
    FIELDS,
    FILTER,
    LIMIT,
    SORT,
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
        self,
        request: AnyRequest,
        filter: Annotated[str | None, FILTER] = None,
        sort: Annotated[str | None, SORT] = None,
        limit: Annotated[int | None, LIMIT] = None,
        cursor: Annotated[str | None, CURSOR] = None,
        fields: Annotated[str | None, FIELDS] = None,
    ) -> Response[PageOf[Volume]]:
        """All volumes."""
        listing = await operations(request).volumes.list(caller(request))
        query = Query(filter, sort, limit, cursor, fields)
        return answer_listing(request, Volume, listing, query)

    @get(
        "/{ref:str}",
        operation_id="getVolume",
        summary="Show a volume",
        responses=errors(304, 404),
    )
    async def get_volume(self, request: AnyRequest, ref: FromPath[str]) -> Response[Volume]:
        """The volume with this name or id."""
        return answer_record(request, await operations(request).volumes.get(caller(request), ref))
