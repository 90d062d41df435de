"""Exports over REST, see `undercroft.operations.exports`."""

from __future__ import annotations

import re
from typing import Annotated

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, HeaderParameter, JSONBody
from litestar.response.base import ASGIResponse

from undercroft.api.answers import (
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    answer_task,
    caller,
    errors,
    operations,
)
from undercroft.api.query import Query
from undercroft.api.streams import Streaming, begin
from undercroft.model.errors import InvalidError
from undercroft.model.export import Export
from undercroft.model.task import Task
from undercroft.model.transfer import ExportCreate

RANGE = HeaderParameter(
    name="Range",
    required=False,
    description="Only part of it, `bytes=FROM-` or `bytes=FROM-TO`: a transfer that was cut off "
    "goes on (RFC 9110, section 14).",
)
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")


class ExportController(Controller):
    """Making, fetching, removing."""

    path = "/v1/exports"
    tags = ["exports"]

    @get(operation_id="listExports", summary="List exports", responses=errors(304))
    async def list_exports(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Export]]:
        """All exports that have not been removed; a day after they were made they are."""
        listing = await operations(request).exports.list(caller(request))
        return answer_listing(request, Export, listing, asked)

    @post(
        operation_id="createExport",
        summary="Export a VM",
        status_code=202,
        responses=errors(404, 409, 413, 501, 502, 507),
    )
    async def create_export(
        self, request: AnyRequest, data: JSONBody[ExportCreate]
    ) -> Response[Task]:
        """Writes a VM as it is at one moment, a snapshot of it, or a template into files to fetch;
        a VM that runs goes on. The task's `spec.object` is the export."""
        return answer_task(await operations(request).exports.create(caller(request), data))

    @get(
        "/{ref:str}",
        operation_id="getExport",
        summary="Show an export",
        responses=errors(304, 404),
    )
    async def get_export(self, request: AnyRequest, ref: FromPath[str]) -> Response[Export]:
        """The export with this id: its files with their sizes and checksums."""
        return answer_record(request, await operations(request).exports.get(caller(request), ref))

    @delete(
        "/{ref:str}",
        operation_id="removeExport",
        summary="Remove an export",
        status_code=200,
        responses=errors(404),
    )
    async def remove_export(self, request: AnyRequest, ref: FromPath[str]) -> Response[Export]:
        """Removes its files; one that is still being made is given up."""
        export = await operations(request).exports.remove(caller(request), ref)
        return Response(content=export, media_type="application/json")

    @get(
        "/{ref:str}/files/{name:str}",
        operation_id="readExport",
        summary="Fetch a file of an export",
        media_type="application/octet-stream",
        responses=errors(404, 409),
    )
    async def read_export(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        name: FromPath[str],
        range_: Annotated[str | None, RANGE] = None,
    ) -> ASGIResponse:
        """The file, or the part of it that is asked for (206)."""
        start, end = _parse_range(range_)
        file, content = await operations(request).exports.content(
            caller(request), ref, name, start, end
        )
        if start > file.size:
            raise InvalidError(f"{name[:80]} has only {file.size} bytes", size=file.size)
        stop = file.size if end is None else min(end, file.size)
        headers = {"content-length": str(stop - start), "accept-ranges": "bytes"}
        if range_ is not None:
            headers["content-range"] = f"bytes {start}-{max(stop - 1, 0)}/{file.size}"
        return Streaming(
            await begin(content),
            "application/octet-stream",
            headers=headers,
            status_code=200 if range_ is None else 206,
        )


def _parse_range(text: str | None) -> tuple[int, int | None]:
    """From which byte, and up to before which.

    Raises:
        InvalidError: not one range of bytes.
    """
    if text is None:
        return 0, None
    match = _RANGE.fullmatch(text.strip())
    if match is None or (match[2] and int(match[2]) < int(match[1])):
        raise InvalidError(
            f"Range {text[:60]!r} is not one range of bytes", action="send bytes=FROM- or leave it"
        )
    return int(match[1]), int(match[2]) + 1 if match[2] else None
