"""Snapshots: a VM as it was at one moment, to go back to or to make others from."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec
from undercroft.model.vm import VMSpec


class SnapshotState(StrEnum):
    """Life of a snapshot."""

    PENDING = "pending"  # being taken
    READY = "ready"


class SnapshotDisk(Model, frozen=True, kw_only=True):
    """What one disk held: the layer (an id) of a volume (an id), and the ``next`` layer, to which
    the volume writes since."""

    volume: str
    layer: str
    next: str


class SnapshotSpec(Spec, frozen=True, kw_only=True):
    """What was asked for. ``vm`` is an id, ``memory`` whether what the guest had in memory belongs
    to it, ``quiesce`` whether the guest was to bring its file systems in order; ``passing``: a
    step on the way to a template, which nobody is shown."""

    vm: str
    description: str = ""
    memory: bool = False
    quiesce: bool = False
    passing: bool = False


class SnapshotStatus(Model, frozen=True, kw_only=True):
    """What it is. ``parent`` (an id) is the snapshot that the VM had come from; ``shape`` what the
    VM was like; ``alive`` whether it was switched on, ``running`` whether its processors ran;
    ``memory``: bytes of its saved memory, 0 if it has none; ``stood_still``: for how many seconds
    the guest did while that was saved, None if nobody stopped it."""

    state: SnapshotState = SnapshotState.PENDING
    parent: str | None = None
    disks: tuple[SnapshotDisk, ...] = ()
    shape: VMSpec | None = None
    alive: bool = False
    running: bool = False
    quiesced: bool = False
    memory: int = 0
    stood_still: float | None = None


class Snapshot(Record, frozen=True, kw_only=True):
    """A snapshot of one VM; its name is unique among those of the VM."""

    kind: ClassVar[str] = "snapshot"
    spec: SnapshotSpec
    status: SnapshotStatus = SnapshotStatus()
