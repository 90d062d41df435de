"""Snapshots of VMs through the API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from undercroft.client.decode import convert, decode
from undercroft.client.raw import Raw, quote
from undercroft.model.requests import RevertRequest, SnapshotCreate
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task


class SnapshotsClient:
    """Snapshots, see `undercroft.operations.snapshots`; ``vm`` and ``ref`` are names or ids."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    def list(self, vm: str) -> Sequence[Snapshot]:
        """Those of a VM, oldest first."""
        return [convert(item, Snapshot) for item in self._raw.list(_path(vm))]

    def get(self, vm: str, ref: str) -> Snapshot:
        """One of them."""
        return decode(self._raw.request("GET", _path(vm, ref)).read(), Snapshot)

    def create(self, vm: str, request: SnapshotCreate | None = None) -> Task:
        """Takes one."""
        return self._post(_path(vm), request or SnapshotCreate())

    def revert(self, vm: str, ref: str, request: RevertRequest | None = None) -> Task:
        """Goes back to one."""
        return self._post(_path(vm, ref) + "/revert", request or RevertRequest())

    def remove(self, vm: str, ref: str) -> Task:
        """Forgets one."""
        return decode(self._raw.request("DELETE", _path(vm, ref)).read(), Task)

    def _post(self, path: str, body: Any) -> Task:
        response = self._raw.request(
            "POST",
            path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(body),
        )
        return decode(response.read(), Task)


def _path(vm: str, ref: str | None = None) -> str:
    path = f"/v1/vms/{quote(vm)}/snapshots"
    return path if ref is None else f"{path}/{quote(ref)}"
