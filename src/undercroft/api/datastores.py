"""Datastores over REST, see `undercroft.operations.datastores`."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from undercroft.api.answers import (
    IF_MATCH,
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    caller,
    errors,
    etag,
    operations,
    parse_if_match,
)
from undercroft.api.query import Query
from undercroft.model.datastore import Datastore
from undercroft.model.requests import DatastoreChange, DatastoreCreate


class DatastoreController(Controller):
    """Making datastores, looking at them, changing and removing them."""

    path = "/v1/datastores"
    tags = ["datastores"]

    @get(operation_id="listDatastores", summary="List datastores", responses=errors(304))
    async def list_datastores(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Datastore]]:
        """All datastores, with how full they are."""
        listing = await operations(request).datastores.list(caller(request))
        return answer_listing(request, Datastore, listing, asked)

    @post(
        operation_id="createDatastore",
        summary="Make a datastore",
        status_code=201,
        responses=errors(404, 409, 507),
    )
    async def create_datastore(
        self, request: AnyRequest, data: JSONBody[DatastoreCreate]
    ) -> Response[Datastore]:
        """Makes a directory of the host one. The directory is made if need be."""
        made = await operations(request).datastores.create(caller(request), data)
        return Response(made.record, status_code=201, headers={"etag": etag(made.revision)})

    @get(
        "/{ref:str}",
        operation_id="getDatastore",
        summary="Show a datastore",
        responses=errors(304, 404),
    )
    async def get_datastore(self, request: AnyRequest, ref: FromPath[str]) -> Response[Datastore]:
        """The datastore with this name or id."""
        found = await operations(request).datastores.get(caller(request), ref)
        return answer_record(request, found)

    @patch(
        "/{ref:str}",
        operation_id="changeDatastore",
        summary="Change a datastore",
        responses=errors(404, 409, 412),
    )
    async def change_datastore(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        data: JSONBody[DatastoreChange],
        if_match: Annotated[str | None, IF_MATCH] = None,
    ) -> Response[Datastore]:
        """Changes its name, or when somebody is told that it fills."""
        changed = await operations(request).datastores.set(
            caller(request), ref, data, parse_if_match(if_match)
        )
        return Response(changed.record, headers={"etag": etag(changed.revision)})

    @delete(
        "/{ref:str}",
        operation_id="removeDatastore",
        summary="Remove a datastore",
        status_code=200,
        responses=errors(404, 409),
    )
    async def remove_datastore(
        self, request: AnyRequest, ref: FromPath[str]
    ) -> Response[Datastore]:
        """Only one that nothing is in; its directory stays. Answers with what it was."""
        return Response(await operations(request).datastores.remove(caller(request), ref))
