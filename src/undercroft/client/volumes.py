"""Volumes through the API."""

from __future__ import annotations

import msgspec

from undercroft.client.decode import decode
from undercroft.client.noun import Noun
from undercroft.client.raw import Raw
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

    def attach(self, ref: str, request: VolumeAttach) -> Task:
        """Gives one to a VM, running or not."""
        return decode(self._request("POST", ref, "/attach", json=request), Task)

    def detach(self, ref: str) -> Task:
        """Takes one away from its VM, running or not."""
        return decode(self._request("POST", ref, "/detach"), Task)

    def resize(self, ref: str, request: VolumeResize) -> Task:
        """Makes one larger; a running guest sees it."""
        return decode(self._request("POST", ref, "/resize", json=request), Task)

    def set(self, ref: str, change: VolumeChange) -> Task:
        """Changes its limits, at once if a running guest has it."""
        return decode(self._request("PATCH", ref, json=change), Task)

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
