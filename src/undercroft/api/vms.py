"""VMs over REST: translation only, see `undercroft.operations.vms`."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, Response, delete, get, patch, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody

from undercroft.api.answers import (
    FORCE,
    IF_MATCH,
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    answer_task,
    answer_tasks,
    caller,
    errors,
    operations,
    parse_if_match,
)
from undercroft.api.query import Query
from undercroft.model.requests import CloneRequest, StopRequest, TaskList, VMChange, VMCreate
from undercroft.model.task import Task
from undercroft.model.vm import VM
from undercroft.store.interface import Versioned


class VMController(Controller):
    """Making, looking at, changing and switching."""

    path = "/v1/vms"
    tags = ["vms"]

    @get(operation_id="listVMs", summary="List VMs", responses=errors(304))
    async def list_vms(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[VM]]:
        """All VMs, or those that pass the filter, page by page."""
        listing = await operations(request).vms.list(caller(request))
        return answer_listing(request, VM, listing, asked)

    @post(
        operation_id="createVM",
        summary="Create a VM",
        status_code=202,
        responses=errors(404, 409, 413, 501, 507),
    )
    async def create_vm(self, request: AnyRequest, data: JSONBody[VMCreate]) -> Response[Task]:
        """Makes a VM from an image, or with an empty disk; starts it if asked to. The task's
        `spec.object` names it."""
        return answer_task(await operations(request).vms.create(caller(request), data))

    @post(
        "/{ref:str}/clone",
        operation_id="cloneVM",
        summary="Clone a VM",
        status_code=202,
        responses=errors(404, 409, 501, 502, 507),
    )
    async def clone_vm(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[CloneRequest]
    ) -> Response[TaskList]:
        """Makes VMs that begin as what this one is at one moment; it goes on unharmed. A task for
        each, whose `spec.object` names it."""
        return answer_tasks(await operations(request).vms.clone(caller(request), ref, data))

    @get("/{ref:str}", operation_id="getVM", summary="Show a VM", responses=errors(304, 404))
    async def get_vm(self, request: AnyRequest, ref: FromPath[str]) -> Response[VM]:
        """The VM with this name or id. Its ETag is the revision that last wrote it."""
        return answer_record(request, await operations(request).vms.get(caller(request), ref))

    @patch(
        "/{ref:str}",
        operation_id="changeVM",
        summary="Change a VM",
        responses=errors(404, 409, 412, 413, 501),
    )
    async def change_vm(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        data: JSONBody[VMChange],
        if_match: Annotated[str | None, IF_MATCH] = None,
    ) -> Response[VM]:
        """Changes what a VM should be; its shape (CPUs, memory, …) at the next start."""
        found: Versioned[VM] = await operations(request).vms.set(
            caller(request), ref, data, parse_if_match(if_match)
        )
        return answer_record(request, found)

    @delete(
        "/{ref:str}",
        operation_id="removeVM",
        summary="Remove a VM",
        status_code=202,
        responses=errors(404, 409),
    )
    async def remove_vm(
        self, request: AnyRequest, ref: FromPath[str], force: Annotated[bool, FORCE] = False
    ) -> Response[Task]:
        """Removes a VM with its disks. `force`: also if it runs."""
        task = await operations(request).vms.remove(caller(request), ref, force=force)
        return answer_task(task)

    @post(
        "/{ref:str}/start",
        operation_id="startVM",
        summary="Start a VM",
        status_code=202,
        responses=errors(404, 409, 501),
    )
    async def start_vm(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Switches it on; one that is suspended goes on where it was."""
        return answer_task(await operations(request).vms.start(caller(request), ref))

    @post(
        "/{ref:str}/stop",
        operation_id="stopVM",
        summary="Stop a VM",
        status_code=202,
        responses=errors(404, 409),
    )
    async def stop_vm(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[StopRequest | None] = None
    ) -> Response[Task]:
        """Asks the guest to shut down, and switches off after a time; at once with `force`."""
        task = await operations(request).vms.stop(caller(request), ref, data or StopRequest())
        return answer_task(task)

    @post(
        "/{ref:str}/restart",
        operation_id="restartVM",
        summary="Restart a VM",
        status_code=202,
        responses=errors(404, 409),
    )
    async def restart_vm(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[StopRequest | None] = None
    ) -> Response[Task]:
        """Stops it, and starts it with what was changed meanwhile."""
        task = await operations(request).vms.restart(caller(request), ref, data or StopRequest())
        return answer_task(task)

    @post(
        "/{ref:str}/reset",
        operation_id="resetVM",
        summary="Reset a VM",
        status_code=202,
        responses=errors(404, 409),
    )
    async def reset_vm(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Presses the reset button."""
        return answer_task(await operations(request).vms.reset(caller(request), ref))

    @post(
        "/{ref:str}/pause",
        operation_id="pauseVM",
        summary="Pause a VM",
        status_code=202,
        responses=errors(404, 409),
    )
    async def pause_vm(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Holds its CPUs; its memory stays where it is."""
        return answer_task(await operations(request).vms.pause(caller(request), ref))

    @post(
        "/{ref:str}/resume",
        operation_id="resumeVM",
        summary="Resume a VM",
        status_code=202,
        responses=errors(404, 409),
    )
    async def resume_vm(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Goes on after pause or suspend."""
        return answer_task(await operations(request).vms.resume(caller(request), ref))

    @post(
        "/{ref:str}/suspend",
        operation_id="suspendVM",
        summary="Suspend a VM",
        status_code=202,
        responses=errors(404, 409, 507),
    )
    async def suspend_vm(self, request: AnyRequest, ref: FromPath[str]) -> Response[Task]:
        """Writes its memory to disk and ends it."""
        return answer_task(await operations(request).vms.suspend(caller(request), ref))
