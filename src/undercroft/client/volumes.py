"""Volumes through the API."""

from __future__ import annotations

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw
from undercroft.model.requests import LayerTree, VolumeClone, VolumeCreate
from undercroft.model.task import Task
from undercroft.model.volume import Volume


class VolumesClient(Noun[Volume]):
    """Volumes, see `undercroft.operations.volumes`."""

    def __init__(self, raw: Raw) -> None:
        super().__init__(raw, "/v1/volumes", Volume)

    def create(self, request: VolumeCreate) -> Task:
        """Makes one that belongs to no VM yet."""
        response = self._raw.request(
            "POST",
            self._path,
            headers={"content-type": "application/json"},
            body=msgspec.json.encode(request),
        )
        return decode(response.read(), Task)

    def remove(self, ref: str) -> Task:
        """Removes one that no VM has."""
        return decode(self._request("DELETE", ref), Task)

    def clone(self, ref: str, request: VolumeClone) -> Task:
        """Makes one that begins as this one is."""
        return decode(self._request("POST", ref, "/clone", json=request), Task)

    def flatten(self, ref: str) -> Task:
        """Has it take over all that it lies on."""
        return decode(self._request("POST", ref, "/flatten"), Task)

    def tree(self) -> LayerTree:
        """All layers, what they lie on, and who needs them."""
        return decode(self._raw.request("GET", "/v1/layers").read(), LayerTree)
