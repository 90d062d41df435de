"""Backups and checkpoints of VMs through the API."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from undercroft.client.decode import convert, decode
from undercroft.client.raw import Raw, quote
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
from undercroft.model.checkpoint import Changes, Checkpoint, CheckpointCreate
from undercroft.model.task import Task


class BackupsClient:
    """Backups, see `undercroft.operations.backups`. A ``repository`` is a directory of the daemon's
    host, ``ref`` the id of a backup, or the name or id of a VM for its newest."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    def create(self, vm: str, request: BackupCreate) -> Task:
        """Backs a VM up."""
        return decode(_post(self._raw, f"/v1/vms/{quote(vm)}/backup", request), Task)

    def stream(self, vm: str, request: BackupStream | None = None) -> Iterator[bytes]:
        """A backup as one archive, piece by piece. The request is sent at once, so that errors are
        raised here and not at the first piece."""
        response = self._raw.request(
            "POST",
            f"/v1/vms/{quote(vm)}/backup/stream",
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request or BackupStream()),
            timeout=600.0,
        )
        return response.chunks()

    def list(self, repository: str, vm: str | None = None) -> BackupList:
        """What is in a repository, oldest first."""
        return convert(
            self._raw.get("/v1/backups", {"repository": repository, "vm": vm}), BackupList
        )

    def get(self, repository: str, ref: str) -> Backup:
        """One of them."""
        found = self._raw.get(f"/v1/backups/{quote(ref)}", {"repository": repository})
        return convert(found, Backup)

    def verify(self, repository: str, *refs: str) -> Task:
        """Compares all, or these, with their checksums."""
        request = VerifyRequest(repository=repository, backups=refs)
        return decode(_post(self._raw, "/v1/backups/verify", request), Task)

    def restore(self, request: RestoreRequest) -> Task:
        """Makes a VM of one."""
        return decode(_post(self._raw, "/v1/backups/restore", request), Task)

    def remove(self, repository: str, ref: str) -> Task:
        """Removes one."""
        path = f"/v1/backups/{quote(ref)}"
        response = self._raw.request("DELETE", path, params={"repository": repository})
        return decode(response.read(), Task)

    def prune(self, request: PruneRequest) -> Pruned:
        """Removes all but those that a rule keeps."""
        return decode(_post(self._raw, "/v1/backups/prune", request), Pruned)


class CheckpointsClient:
    """Checkpoints, see `undercroft.operations.checkpoints`; ``vm`` is a name or id, ``id`` that of
    a checkpoint."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    def list(self, vm: str) -> Sequence[Checkpoint]:
        """Those of a VM, oldest first."""
        return [convert(item, Checkpoint) for item in self._raw.list(_path(vm))]

    def get(self, vm: str, id: str) -> Checkpoint:
        """One of them."""
        return decode(self._raw.request("GET", _path(vm, id)).read(), Checkpoint)

    def create(self, vm: str, request: CheckpointCreate | None = None) -> Task:
        """Makes one; the task's result names it."""
        return decode(_post(self._raw, _path(vm), request or CheckpointCreate()), Task)

    def changes(self, vm: str, id: str, disk: int = 0, since: str | None = None) -> Changes:
        """What of a disk has changed since an earlier one; without one, all but zeroes."""
        params = {"disk": disk, "since": since}
        return convert(self._raw.get(_path(vm, id) + "/changes", params), Changes)

    def read(self, vm: str, id: str, disk: int, offset: int, length: int) -> Iterator[bytes]:
        """A part of a disk as it was, in pieces."""
        response = self._raw.request(
            "GET",
            _path(vm, id) + f"/disks/{disk}",
            headers={"range": f"bytes={offset}-{offset + length - 1}"},
        )
        yield from response.chunks()

    def release(self, vm: str, id: str) -> Task:
        """Lets the content of one go; what changed since stays known."""
        return decode(_post(self._raw, _path(vm, id) + "/release", None), Task)

    def remove(self, vm: str, id: str) -> Task:
        """Removes one."""
        return decode(self._raw.request("DELETE", _path(vm, id)).read(), Task)


def _path(vm: str, id: str | None = None) -> str:
    path = f"/v1/vms/{quote(vm)}/checkpoints"
    return path if id is None else f"{path}/{quote(id)}"


def _post(raw: Raw, path: str, body: Any) -> bytes:
    if body is None:
        return raw.request("POST", path).read()
    response = raw.request(
        "POST",
        path,
        headers={"content-type": "application/json"},
        body=msgspec.json.encode(body),
    )
    return response.read()
