"""Imports and uploads through the API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import BinaryIO

import msgspec

from undercroft.client.decode import decode
from undercroft.client.raw import Raw, quote
from undercroft.client.vms import pieces
from undercroft.model.appliance import Appliance
from undercroft.model.task import Task
from undercroft.model.transfer import ImportCreate, ImportSource, UploadStatus


class ImportsClient:
    """Imports, see `undercroft.operations.imports` and ``uploads``."""

    def __init__(self, raw: Raw) -> None:
        self._raw = raw

    def create(self, request: ImportCreate) -> Task:
        """Makes a VM of it; the task's ``spec.object`` names it."""
        return decode(self._post("/v1/imports", request), Task)

    def examine(self, source: ImportSource) -> Appliance:
        """What is in it."""
        return decode(self._post("/v1/imports/examine", source), Appliance)

    def upload_status(self, key: str) -> UploadStatus:
        """How much of an upload is there."""
        return decode(self._raw.request("GET", _path(key)).read(), UploadStatus)

    def append(
        self, key: str, offset: int, content: bytes | Iterable[bytes] | BinaryIO
    ) -> UploadStatus:
        """Sends a piece of it, the first of whose bytes is number ``offset``."""
        response = self._raw.request(
            "PUT",
            _path(key),
            params={"offset": offset},
            headers={"content-type": "application/octet-stream"},
            body=pieces(content),
            timeout=600.0,
        )
        return decode(response.read(), UploadStatus)

    def remove_upload(self, key: str) -> UploadStatus:
        """Forgets it; what it was."""
        return decode(self._raw.request("DELETE", _path(key)).read(), UploadStatus)

    def _post(self, path: str, body: ImportSource) -> bytes:
        response = self._raw.request(
            "POST",
            path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(body),
        )
        return response.read()


def _path(key: str) -> str:
    return f"/v1/uploads/{quote(key)}"
