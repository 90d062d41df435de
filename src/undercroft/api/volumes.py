"""Volumes over REST, see `undercroft.operations.volumes`."""

from __future__ import annotations

from litestar import Controller, Response, delete, get, patch, post
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
from undercroft.model.requests import (
    LayerTree,
    VolumeAttach,
    VolumeChange,
    VolumeClone,
    VolumeCreate,
    VolumeResize,
)
from undercroft.model.task import Task
from undercroft.model.volume import Volume


class VolumeController(Controller):
    """Making volumes, looking at them, removing them. Those of VMs come with their VMs."""

    path = "/v1/volumes"
    tags = ["volumes"]

    @get(operation_id="listVolumes", summary="List volumes", responses=errors(304))
    async def list_volumes(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Volume]]:
        """All volumes."""
        listing = await operations(request).volumes.list(caller(request))
        return answer_listing(request, Volume, listing, asked)

    @post(
        operation_id="createVolume",
        summary="Make a volume",
        status_code=202,
        responses=errors(404, 409, 507),
    )
    async def create_volume(
        self, request: AnyRequest, data: JSONBody[VolumeCreate]
    ) -> Response[Task]:
        """Makes a volume that belongs to no VM yet. The task's result names it."""
        return answer_task(await operations(request).volumes.create(caller(request), data))

    @get(
        "/{ref:str}",
        operation_id="getVolume",
        summary="Show a volume",
        responses=errors(304, 404),
    )
    async def get_volume(self, request: AnyRequest, ref: FromPath[str]) -> Response[Volume]:
        """The volume with this name or id."""
        return answer_record(request, await operations(request).volumes.get(caller(request), ref))

    @patch(
        "/{ref:str}",
        operation_id="changeVolume",
        summary="Limit a volume",
        status_code=202,
        responses=errors(404, 409),
    )
    async def change_volume(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[VolumeChange]
    ) -> Response[Task]:
        """Changes what a guest may do with the volume per second, at once if it runs; 0 takes a
        limit away."""
        return answer_task(await operations(request).volumes.set(caller(request), ref, data))

    @post(
        "/{ref:str}/attach",
        operation_id="attachVolume",
        summary="Attach a volume",
        status_code=202,
        responses=errors(404, 409, 501, 502),
    )
    async def attach_volume(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[VolumeAttach]
    ) -> Response[Task]:
        """Gives the volume to a VM, running or not. The task is one of the VM's."""
        return answer_task(await operations(request).volumes.attach(caller(request), ref, data))

    @post(
        "/{ref:str}/detach",
        operation_id="detachVolume",
        summary="Detach a volume",
        status_code=202,
        responses=errors(404, 409, 501, 502, 504),
    )
    async def detach_volume(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Takes the volume away from its VM; a running guest is asked to let go of it, and has 30
        seconds for that. From then on it stands for itself, and outlives the VM."""
        return answer_task(await operations(request).volumes.detach(caller(request), ref))

    @post(
        "/{ref:str}/resize",
        operation_id="resizeVolume",
        summary="Make a volume larger",
        status_code=202,
        responses=errors(404, 409, 502, 507),
    )
    async def resize_volume(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[VolumeResize]
    ) -> Response[Task]:
        """To `size` bytes, or larger `by` so many. A running guest sees it at once; snapshots keep
        the size that they have."""
        return answer_task(await operations(request).volumes.resize(caller(request), ref, data))

    @delete(
        "/{ref:str}",
        operation_id="removeVolume",
        summary="Remove a volume",
        status_code=202,
        responses=errors(404, 409),
    )
    async def remove_volume(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Removes a volume that no VM has, with what is on it."""
        return answer_task(await operations(request).volumes.remove(caller(request), ref))

    @post(
        "/{ref:str}/clone",
        operation_id="cloneVolume",
        summary="Make a volume that begins as another is",
        status_code=202,
        responses=errors(404, 409, 502, 507),
    )
    async def clone_volume(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[VolumeClone]
    ) -> Response[Task]:
        """The new one lies on what both have in common, or has a copy of it. The source may be in
        use, and goes on. The task's result names the new volume."""
        return answer_task(await operations(request).volumes.clone(caller(request), ref, data))

    @post(
        "/{ref:str}/flatten",
        operation_id="flattenVolume",
        summary="Have a volume need nothing of others",
        status_code=202,
        responses=errors(404, 409, 502, 507),
    )
    async def flatten_volume(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Has a volume take over all that it lies on. A VM that has it may run meanwhile."""
        return answer_task(await operations(request).volumes.flatten(caller(request), ref))


@get(
    "/v1/layers",
    operation_id="listLayers",
    summary="Show how volumes lie on each other",
    tags=["volumes"],
    responses=errors(),
)
async def layers(request: AnyRequest) -> Response[LayerTree]:
    """All layers of volumes, what they lie on, and who needs them."""
    return Response(await operations(request).volumes.tree(caller(request)))
