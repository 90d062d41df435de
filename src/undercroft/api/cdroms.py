"""CD-ROM drives of VMs over REST, see `undercroft.operations.cdroms`."""

from __future__ import annotations

from litestar import Controller, Response, delete, post
from litestar.params import FromPath, JSONBody

from undercroft.api.answers import AnyRequest, answer_task, caller, errors, operations
from undercroft.model.requests import EjectRequest, InsertRequest, NewCdrom
from undercroft.model.task import Task


class CdromController(Controller):
    """Drives and discs that come and go. Which there are is in the VM's `spec.cdroms`."""

    path = "/v1/vms/{ref:str}/cdroms"
    tags = ["vms"]

    @post(
        operation_id="addCdrom",
        summary="Give a VM a CD-ROM drive",
        status_code=202,
        responses=errors(404, 409, 501, 502),
    )
    async def add_cdrom(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[NewCdrom | None] = None
    ) -> Response[Task]:
        """One more drive, empty or with the disc in `path`, a file on the daemon's host. On SATA it
        comes only while the VM is off. The task's result has its number (`drive`)."""
        task = await operations(request).cdroms.add(caller(request), ref, data or NewCdrom())
        return answer_task(task)

    @delete(
        "/{drive:int}",
        operation_id="removeCdrom",
        summary="Take a CD-ROM drive away",
        status_code=202,
        responses=errors(404, 409, 501, 502, 504),
    )
    async def remove_cdrom(
        self, request: AnyRequest, ref: FromPath[str], drive: FromPath[int]
    ) -> Response[Task]:
        """Takes a drive away from a VM, with what is in it; one on SATA only while it is off."""
        task = await operations(request).cdroms.remove(caller(request), ref, drive)
        return answer_task(task)

    @post(
        "/{drive:int}/insert",
        operation_id="insertDisc",
        summary="Put a disc into a drive",
        status_code=202,
        responses=errors(404, 409, 502),
    )
    async def insert_disc(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        drive: FromPath[int],
        data: JSONBody[InsertRequest],
    ) -> Response[Task]:
        """Puts an ISO 9660 or UDF image, a file on the daemon's host, into a drive, in place of
        what is in it. A running guest sees that at once; if it has locked the drive, only with
        `force`."""
        task = await operations(request).cdroms.insert(caller(request), ref, drive, data)
        return answer_task(task)

    @post(
        "/{drive:int}/eject",
        operation_id="ejectDisc",
        summary="Take a disc out of a drive",
        status_code=202,
        responses=errors(404, 409, 502),
    )
    async def eject_disc(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        drive: FromPath[int],
        data: JSONBody[EjectRequest | None] = None,
    ) -> Response[Task]:
        """Empties a drive. A guest that uses the disc has locked the drive: it is asked to open it,
        and after five seconds only `force` helps. `force` is also for a VM that is suspended."""
        task = await operations(request).cdroms.eject(
            caller(request), ref, drive, data or EjectRequest()
        )
        return answer_task(task)
