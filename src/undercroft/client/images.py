"""Images through the API."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, BinaryIO

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw
from undercroft.client.vms import pieces
from undercroft.model.image import DiskFormat, Image
from undercroft.model.requests import ImageCreate
from undercroft.model.task import Task


class ImagesClient(Noun[Image]):
    """Images, see `undercroft.operations.images`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/images", Image)

    def create(self, request: ImageCreate) -> Task:
        """Builds, fetches or imports an image."""
        response = self._raw.request(
            "POST",
            self._path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request),
        )
        return decode(response.read(), Task)

    def upload(
        self,
        content: bytes | Iterable[bytes] | BinaryIO,
        *,
        name: str,
        format: DiskFormat | None = None,
        sha256: str | None = None,
        firmware: str | None = None,
        user: str | None = None,
        replace: bool = False,
    ) -> Task:
        """Sends an image's content and imports it."""
        params = {
            "name": name,
            "format": None if format is None else str(format),
            "sha256": sha256,
            "firmware": firmware,
            "user": user,
            "replace": replace or None,
        }
        response = self._raw.request(
            "POST",
            f"{self._path}/upload",
            params=params,
            headers={"content-type": "application/octet-stream"},
            body=pieces(content),
            timeout=600.0,
        )
        return decode(response.read(), Task)

    def remove(self, ref: str, force: bool = False) -> Task:
        """Removes an image."""
        return decode(self._request("DELETE", ref, params={"force": force}), Task)

    def catalogue(self) -> list[dict[str, Any]]:
        """The images that are known by name and can be fetched."""
        answer = self._raw.get("/v1/catalogue")
        items: list[dict[str, Any]] = answer["items"]
        return items
