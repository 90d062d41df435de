"""Backups over REST, see `undercroft.operations.backups`."""

from __future__ import annotations

from typing import Annotated

from litestar import Controller, Response, delete, get, post
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response.base import ASGIResponse

from undercroft.api.answers import AnyRequest, answer_task, caller, errors, operations
from undercroft.api.streams import Streaming, begin
from undercroft.model.backup import (
    Backup,
    BackupCreate,
    BackupList,
    BackupStream,
    Pruned,
    PruneRequest,
    RestoreRequest,
    VerifyRequest,
)
from undercroft.model.task import Task

REPOSITORY = QueryParameter(
    name="repository", description="The directory of the repository, on the daemon's host."
)
VM = QueryParameter(name="vm", required=False, description="Only those of this VM (name or id).")


class BackupController(Controller):
    """Making, looking at, verifying, restoring and removing backups."""

    path = "/v1"
    tags = ["backups"]

    @post(
        "/vms/{ref:str}/backup",
        operation_id="backUpVM",
        summary="Back a VM up",
        status_code=202,
        responses=errors(403, 404, 409, 502, 507),
    )
    async def back_up(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[BackupCreate]
    ) -> Response[Task]:
        """All disks as they are at one moment, firmware settings and TPM; the VM goes on. Only what
        changed since the backup before is read, where that is known. The task's result tells what
        was read and written."""
        return answer_task(await operations(request).backups.create(caller(request), ref, data))

    @post(
        "/vms/{ref:str}/backup/stream",
        operation_id="streamBackup",
        summary="Back a VM up through a pipe",
        status_code=200,
        media_type="application/octet-stream",
        responses=errors(403, 404, 409, 502, 507),
    )
    async def stream_backup(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[BackupStream | None] = None
    ) -> ASGIResponse:
        """The backup as one archive (docs/backup.md), whole if it ends with its manifest; made as
        fast as it is read. Nothing of it stays here."""
        content = await operations(request).backups.stream(
            caller(request), ref, data or BackupStream()
        )
        return Streaming(await begin(content), "application/octet-stream")

    @get("/backups", operation_id="listBackups", summary="List backups", responses=errors(403, 404))
    async def list_backups(
        self,
        request: AnyRequest,
        repository: Annotated[str, REPOSITORY],
        vm: Annotated[str | None, VM] = None,
    ) -> Response[BackupList]:
        """The backups in a repository, oldest first."""
        found = await operations(request).backups.list(caller(request), repository, vm)
        return Response(content=found, media_type="application/json")

    @get(
        "/backups/{ref:str}",
        operation_id="getBackup",
        summary="Show a backup",
        responses=errors(403, 404),
    )
    async def get_backup(
        self, request: AnyRequest, ref: FromPath[str], repository: Annotated[str, REPOSITORY]
    ) -> Response[Backup]:
        """The backup with this id, or the newest one of the VM with this name or id."""
        found = await operations(request).backups.get(caller(request), repository, ref)
        return Response(content=found, media_type="application/json")

    @post(
        "/backups/verify",
        operation_id="verifyBackups",
        summary="Verify backups",
        status_code=202,
        responses=errors(403, 404),
    )
    async def verify_backups(
        self, request: AnyRequest, data: JSONBody[VerifyRequest]
    ) -> Response[Task]:
        """Reads all of them and compares with their checksums; the task fails if anything is
        damaged."""
        task = await operations(request).backups.verify(
            caller(request), data.repository, data.backups
        )
        return answer_task(task)

    @post(
        "/backups/restore",
        operation_id="restoreBackup",
        summary="Restore a backup",
        status_code=202,
        responses=errors(403, 404, 409, 507),
    )
    async def restore_backup(
        self, request: AnyRequest, data: JSONBody[RestoreRequest]
    ) -> Response[Task]:
        """Makes a new VM of it, or makes one what it was."""
        return answer_task(await operations(request).backups.restore(caller(request), data))

    @post(
        "/backups/prune",
        operation_id="pruneBackups",
        summary="Remove old backups",
        status_code=200,
        responses=errors(403, 404),
    )
    async def prune_backups(
        self, request: AnyRequest, data: JSONBody[PruneRequest]
    ) -> Response[Pruned]:
        """Removes all but those that the rule keeps."""
        found = await operations(request).backups.prune(caller(request), data)
        return Response(content=found, media_type="application/json")

    @delete(
        "/backups/{ref:str}",
        operation_id="removeBackup",
        summary="Remove a backup",
        status_code=202,
        responses=errors(403, 404),
    )
    async def remove_backup(
        self, request: AnyRequest, ref: FromPath[str], repository: Annotated[str, REPOSITORY]
    ) -> Response[Task]:
        """Others stay whole, also those that were made after it."""
        task = await operations(request).backups.remove(caller(request), repository, [ref])
        return answer_task(task)
