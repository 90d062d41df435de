"""What comes in over REST, see `undercroft.operations.imports` and ``uploads``."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, Response, delete, get, post, put
from litestar.params import FromPath, JSONBody, QueryParameter

from undercroft.api.answers import AnyRequest, answer_task, caller, errors, operations
from undercroft.api.guests import body_pieces
from undercroft.model.appliance import Appliance
from undercroft.model.task import Task
from undercroft.model.transfer import ImportCreate, ImportSource, UploadStatus

OFFSET = QueryParameter(name="offset", description="How many bytes are there already.")


class ImportController(Controller):
    """VMs made of files."""

    path = "/v1/imports"
    tags = ["imports"]

    @post(
        operation_id="createImport",
        summary="Import a VM",
        status_code=202,
        responses=errors(404, 409, 501, 507),
    )
    async def create_import(
        self, request: AnyRequest, data: JSONBody[ImportCreate]
    ) -> Response[Task]:
        """Makes a VM of an OVA or a disk that was sent (`upload`) or lies on the daemon's host
        (`path`). The task's `spec.object` is the VM, its `result.notes` what was not taken over. An
        upload is used up, however it ends."""
        return answer_task(await operations(request).imports.create(caller(request), data))

    @post(
        "/examine",
        operation_id="examineImport",
        summary="Look into a file",
        status_code=200,
        responses=errors(404),
    )
    async def examine_import(
        self, request: AnyRequest, data: JSONBody[ImportSource]
    ) -> Response[Appliance]:
        """What would become of it, without making anything."""
        found = await operations(request).imports.examine(caller(request), data)
        return Response(content=found, media_type="application/json")


class UploadController(Controller):
    """Files that are sent in pieces, under a key that the sender chooses: whoever was cut off asks
    how much is there and goes on."""

    path = "/v1/uploads/{key:str}"
    tags = ["imports"]

    @get(operation_id="getUpload", summary="Ask how much of an upload is there")
    async def get_upload(self, request: AnyRequest, key: FromPath[str]) -> Response[UploadStatus]:
        """How many bytes are there; 0 of one that nobody has begun."""
        status = await operations(request).uploads.get(caller(request), key)
        return Response(content=status, media_type="application/json")

    @put(
        operation_id="appendUpload",
        summary="Send a piece of an upload",
        request_max_body_size=None,
        responses=errors(409, 507),
    )
    async def append_upload(
        self, request: AnyRequest, key: FromPath[str], offset: Annotated[int, OFFSET]
    ) -> Response[UploadStatus]:
        """Adds the body, of any length, at the end. What arrived before a connection broke is kept;
        an upload that nobody uses is removed after a day."""
        status = await operations(request).uploads.append(
            caller(request), key, offset, body_pieces(request)
        )
        return Response(content=status, media_type="application/json")

    @delete(operation_id="removeUpload", summary="Forget an upload", status_code=200)
    async def remove_upload(
        self, request: AnyRequest, key: FromPath[str]
    ) -> Response[UploadStatus]:
        """Forgets it; what it was."""
        status = await operations(request).uploads.remove(caller(request), key)
        return Response(content=status, media_type="application/json")
