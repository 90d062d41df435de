"""Layers: the files that the content of volumes is in.

A volume writes to one layer, its head. Beneath that lie layers that never change again, each
holding what differs from the one below; at the bottom perhaps the disk of an image. Volumes and
snapshots that have a past in common share its layers.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec


class LayerState(StrEnum):
    """Life of a layer."""

    PENDING = "pending"  # its file may not be there yet
    READY = "ready"


class LayerFormat(StrEnum):
    """What the file is. Only the lowest layer can be raw: a raw file has no room for what lies
    beneath it."""

    QCOW2 = "qcow2"
    RAW = "raw"


class LayerSpec(Spec, frozen=True, kw_only=True):
    """What a layer is: ``size`` in bytes as the guest sees it, the ``parent`` (a layer's id) that
    it lies on, or else the ``image`` (an id), or nothing; ``host`` is where its file is;
    ``preallocated``: the file has all of its room from the beginning, and all that it lay on, as
    has one of the ``format`` raw; ``datastore`` (an id) is where the file is, None: in the data
    directory; ``encrypted``: with a key of its own, as is all that lies on it."""

    host: str
    size: int
    parent: str | None = None
    image: str | None = None
    preallocated: bool = False
    format: LayerFormat = LayerFormat.QCOW2
    datastore: str | None = None
    encrypted: bool = False

    @property
    def whole(self) -> bool:
        """Whether its file has a copy of what it would lie on."""
        return self.preallocated or self.format is LayerFormat.RAW


class LayerStatus(Model, frozen=True, kw_only=True):
    """What has become of it."""

    state: LayerState = LayerState.PENDING


class Layer(Record, frozen=True, kw_only=True):
    """A layer. Only the agent of its host makes, changes and removes any."""

    kind: ClassVar[str] = "layer"
    spec: LayerSpec
    status: LayerStatus = LayerStatus()
