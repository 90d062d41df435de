"""Checkpoints of VMs over REST, see `undercroft.operations.checkpoints`."""

from __future__ import annotations

import re
from typing import Annotated

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter
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
from undercroft.model.checkpoint import Changes, Checkpoint, CheckpointCreate
from undercroft.model.errors import InvalidError
from undercroft.model.task import Task

DISK = QueryParameter(name="disk", required=False, description="Which disk, counted from 0.")
SINCE = QueryParameter(
    name="since",
    required=False,
    description="The id of an earlier checkpoint. Without it: all that is not zeroes.",
)
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class CheckpointController(Controller):
    """Moments of a VM's disks, for backups."""

    path = "/v1/vms/{ref:str}/checkpoints"
    tags = ["checkpoints"]

    @get(operation_id="listCheckpoints", summary="List checkpoints", responses=errors(304, 404))
    async def list_checkpoints(
        self, request: AnyRequest, ref: FromPath[str], asked: NamedDependency[Query]
    ) -> Response[PageOf[Checkpoint]]:
        """All checkpoints of a VM, also those that backups count from."""
        listing = await operations(request).checkpoints.list(caller(request), ref)
        return answer_listing(request, Checkpoint, listing, asked)

    @post(
        operation_id="createCheckpoint",
        summary="Make a checkpoint",
        status_code=202,
        responses=errors(404, 409, 502, 507),
    )
    async def create_checkpoint(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        data: JSONBody[CheckpointCreate | None] = None,
    ) -> Response[Task]:
        """Keeps what all disks hold at one moment, to be read, and notes what changes since. The
        task's result names the checkpoint. Release it as soon as it is read."""
        task = await operations(request).checkpoints.create(
            caller(request), ref, data or CheckpointCreate()
        )
        return answer_task(task)

    @get(
        "/{checkpoint:str}",
        operation_id="getCheckpoint",
        summary="Show a checkpoint",
        responses=errors(304, 404),
    )
    async def get_checkpoint(
        self, request: AnyRequest, ref: FromPath[str], checkpoint: FromPath[str]
    ) -> Response[Checkpoint]:
        """The VM's checkpoint with this id."""
        found = await operations(request).checkpoints.get(caller(request), ref, checkpoint)
        return answer_record(request, found)

    @get(
        "/{checkpoint:str}/changes",
        operation_id="getChanges",
        summary="What has changed since an earlier checkpoint",
        responses=errors(404, 409, 502),
    )
    async def get_changes(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        checkpoint: FromPath[str],
        disk: Annotated[int, DISK] = 0,
        since: Annotated[str | None, SINCE] = None,
    ) -> Response[Changes]:
        """The parts of a disk that are not what they were. `conflict`: that is not known (QEMU was
        killed, the VM went back to a snapshot): everything has to be read."""
        found = await operations(request).checkpoints.changes(
            caller(request), ref, checkpoint, disk, since
        )
        return Response(content=found, media_type="application/json")

    @get(
        "/{checkpoint:str}/disks/{disk:int}",
        operation_id="readDisk",
        summary="Read a disk as it was",
        media_type="application/octet-stream",
        responses=errors(404, 409, 502),
    )
    async def read_disk(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        checkpoint: FromPath[str],
        disk: FromPath[int],
    ) -> ASGIResponse:
        """The disk's content; with a header `Range: bytes=A-B` that part of it (status 206)."""
        checkpoints, who = operations(request).checkpoints, caller(request)
        size = (await checkpoints.disk(who, ref, checkpoint, disk)).size
        text = request.headers.get("range")
        offset, length = _range(text, size)
        content = await checkpoints.read(who, ref, checkpoint, disk, offset, length)
        headers = {"accept-ranges": "bytes", "content-length": str(length)}
        if text is not None:
            headers["content-range"] = f"bytes {offset}-{offset + length - 1}/{size}"
        return Streaming(
            await begin(content),
            "application/octet-stream",
            headers=headers,
            status_code=200 if text is None else 206,
        )

    @post(
        "/{checkpoint:str}/release",
        operation_id="releaseCheckpoint",
        summary="Let the content of a checkpoint go",
        status_code=202,
        responses=errors(404, 409),
    )
    async def release_checkpoint(
        self, request: AnyRequest, ref: FromPath[str], checkpoint: FromPath[str]
    ) -> Response[Task]:
        """It cannot be read any more; what changed since is still known to later checkpoints."""
        task = await operations(request).checkpoints.release(caller(request), ref, checkpoint)
        return answer_task(task)

    @delete(
        "/{checkpoint:str}",
        operation_id="removeCheckpoint",
        summary="Remove a checkpoint",
        status_code=202,
        responses=errors(404, 409),
    )
    async def remove_checkpoint(
        self, request: AnyRequest, ref: FromPath[str], checkpoint: FromPath[str]
    ) -> Response[Task]:
        """Lets its content go, and does not note any more what changes."""
        task = await operations(request).checkpoints.release(
            caller(request), ref, checkpoint, remove=True
        )
        return answer_task(task)


def _range(text: str | None, size: int) -> tuple[int, int]:
    """What a Range header (RFC 9110) asks for, as offset and length.

    Raises:
        InvalidError: it is none of one range, or outside of the disk.
    """
    if text is None:
        return 0, size
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise InvalidError(
            f"{text[:60]!r} is no range that can be read", action="ask for bytes=FIRST-LAST"
        )
    first, last = int(match[1]), int(match[2]) if match[2] else size - 1
    last = min(last, size - 1)
    if first > last:
        raise InvalidError(f"the disk has {size} bytes", action="ask for a part of those")
    return first, last - first + 1
