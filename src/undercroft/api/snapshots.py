"""Snapshots of VMs over REST, see `undercroft.operations.snapshots`."""

from __future__ import annotations

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

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
from undercroft.model.requests import RevertRequest, SnapshotCreate
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task


class SnapshotController(Controller):
    """Taking, looking at, going back to, forgetting."""

    path = "/v1/vms/{ref:str}/snapshots"
    tags = ["snapshots"]

    @get(operation_id="listSnapshots", summary="List snapshots", responses=errors(304, 404))
    async def list_snapshots(
        self, request: AnyRequest, ref: FromPath[str], asked: NamedDependency[Query]
    ) -> Response[PageOf[Snapshot]]:
        """All snapshots of a VM; `status.parent` tells which one came from which."""
        listing = await operations(request).snapshots.list(caller(request), ref)
        return answer_listing(request, Snapshot, listing, asked)

    @post(
        operation_id="createSnapshot",
        summary="Take a snapshot",
        status_code=202,
        responses=errors(404, 409, 502, 507),
    )
    async def create_snapshot(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[SnapshotCreate]
    ) -> Response[Task]:
        """Keeps what the VM is now; the task's result names the snapshot."""
        return answer_task(await operations(request).snapshots.create(caller(request), ref, data))

    @get(
        "/{snapshot:str}",
        operation_id="getSnapshot",
        summary="Show a snapshot",
        responses=errors(304, 404),
    )
    async def get_snapshot(
        self, request: AnyRequest, ref: FromPath[str], snapshot: FromPath[str]
    ) -> Response[Snapshot]:
        """The VM's snapshot with this name or id."""
        found = await operations(request).snapshots.get(caller(request), ref, snapshot)
        return answer_record(request, found)

    @post(
        "/{snapshot:str}/revert",
        operation_id="revertSnapshot",
        summary="Go back to a snapshot",
        status_code=202,
        responses=errors(404, 409),
    )
    async def revert_snapshot(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        snapshot: FromPath[str],
        data: JSONBody[RevertRequest | None] = None,
    ) -> Response[Task]:
        """Makes the VM what it was; what it has become since is lost unless a snapshot has it."""
        task = await operations(request).snapshots.revert(
            caller(request), ref, snapshot, data or RevertRequest()
        )
        return answer_task(task)

    @delete(
        "/{snapshot:str}",
        operation_id="removeSnapshot",
        summary="Forget a snapshot",
        status_code=202,
        responses=errors(404, 409),
    )
    async def remove_snapshot(
        self, request: AnyRequest, ref: FromPath[str], snapshot: FromPath[str]
    ) -> Response[Task]:
        """The VM, and snapshots that came from this one, stay as they are."""
        return answer_task(
            await operations(request).snapshots.remove(caller(request), ref, snapshot)
        )
