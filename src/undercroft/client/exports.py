"""Exports through the API."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw, quote
from undercroft.model.export import Export
from undercroft.model.task import Task
from undercroft.model.transfer import ExportCreate


class ExportsClient(Noun[Export]):
    """Exports, see `undercroft.operations.exports`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/exports", Export)

    def create(self, request: ExportCreate) -> Task:
        """Makes one; the task's ``spec.object`` names it."""
        response = self._raw.request(
            "POST",
            self._path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request),
        )
        return decode(response.read(), Task)

    def read(self, ref: str, name: str, start: int = 0) -> Iterator[bytes]:
        """A file of it, from a byte on, piece by piece. The request is sent at once, so that errors
        are raised here and not at the first piece."""
        response = self._raw.request(
            "GET",
            self._url(ref, f"/files/{quote(name)}"),
            headers={"range": f"bytes={start}-"},
        )
        return response.chunks()

    def remove(self, ref: str) -> Export:
        """Removes it; what it was."""
        return decode(self._request("DELETE", ref), Export)
