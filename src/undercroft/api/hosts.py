"""Hosts over REST, see `undercroft.operations.core`."""

from __future__ import annotations

from litestar import Controller, Response, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

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
from undercroft.model.base import Spec
from undercroft.model.host import Host
from undercroft.model.requests import CheckReport


class CheckRequest(Spec, frozen=True, kw_only=True):
    """Whether a check shall also put right what it finds."""

    repair: bool = False


class HostController(Controller):
    """Looking at hosts and checking them; ``self`` is the one that answers."""

    path = "/v1/hosts"
    tags = ["hosts"]

    @get(operation_id="listHosts", summary="List hosts", responses=errors(304))
    async def list_hosts(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Host]]:
        """All hosts."""
        listing = await operations(request).hosts.list(caller(request))
        return answer_listing(request, Host, listing, asked)

    @get("/{ref:str}", operation_id="getHost", summary="Show a host", responses=errors(304, 404))
    async def get_host(self, request: AnyRequest, ref: FromPath[str]) -> Response[Host]:
        """The host with this name or id; `self` is the one that answers."""
        return answer_record(request, await operations(request).hosts.get(caller(request), ref))

    @post(
        "/self/check",
        operation_id="checkHost",
        summary="Look for what a crash left behind",
        status_code=200,
        responses=errors(),
    )
    async def check_host(
        self, request: AnyRequest, data: JSONBody[CheckRequest | None] = None
    ) -> Response[CheckReport]:
        """Compares processes, files and records; with `repair` puts right what does not fit."""
        repair = data is not None and data.repair
        report = await operations(request).hosts.check(caller(request), repair)
        return Response(content=report, media_type="application/json")

    @post(
        "/self/volumes/check",
        operation_id="checkVolumes",
        summary="Look for what is wrong with volumes",
        status_code=200,
        responses=errors(),
    )
    async def check_volumes(
        self, request: AnyRequest, data: JSONBody[CheckRequest | None] = None
    ) -> Response[CheckReport]:
        """Holds the files of volumes against the records, and looks into them; with `repair` gives
        back what is leaked."""
        repair = data is not None and data.repair
        report = await operations(request).hosts.check_volumes(caller(request), repair)
        return Response(content=report, media_type="application/json")
