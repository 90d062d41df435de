"""Checkpoints: moments of a VM's disks, whose content can be read and since which is known what has
changed. Backups are made from them, Undercroft's own and those of others."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec
from undercroft.model.vm import VMSpec


class CheckpointState(StrEnum):
    """Life of a checkpoint."""

    OPEN = "open"  # what its disks held is kept, and can be read
    RELEASED = "released"  # only what has changed since is kept track of


class CheckpointDisk(Model, frozen=True, kw_only=True):
    """A disk at that moment: its volume (an id) of ``size`` bytes, the ``layer`` (an id) that has
    what it held, and the ``next`` one, where the marks of what is written since begin;
    ``read_only``: its guest cannot write to it."""

    volume: str
    size: int
    layer: str
    next: str
    read_only: bool = False


class CheckpointSpec(Spec, frozen=True, kw_only=True):
    """Of which VM (an id), whether its guest was to bring its file systems in order first, and for
    whom it is: ``backup/ID`` for the repository of that id, else whatever its user says."""

    vm: str
    quiesce: bool = False
    owner: str = ""


class CheckpointStatus(Model, frozen=True, kw_only=True):
    """What it is. ``snapshot`` (an id) holds the content while it is open; ``shape`` is what the VM
    was like, ``running`` whether its guest ran."""

    state: CheckpointState = CheckpointState.OPEN
    snapshot: str | None = None
    disks: tuple[CheckpointDisk, ...] = ()
    shape: VMSpec | None = None
    running: bool = False
    quiesced: bool = False


class Checkpoint(Record, frozen=True, kw_only=True):
    """A checkpoint of one VM. Its name is its id."""

    kind: ClassVar[str] = "checkpoint"
    spec: CheckpointSpec
    status: CheckpointStatus = CheckpointStatus()


class CheckpointCreate(Spec, frozen=True, kw_only=True):
    """A new checkpoint. ``owner``: a note of whose it is; ``quiesce``: have the guest's agent bring
    its file systems in order first."""

    quiesce: bool = False
    owner: str = ""


class ChangedExtent(Model, frozen=True, kw_only=True):
    """A part of a disk, in bytes; ``zero``: it reads as zeroes."""

    offset: int
    length: int
    zero: bool = False


class Changes(Model, frozen=True, kw_only=True):
    """What of a disk of ``size`` bytes is not what it was: ascending, in units of 64 KiB. Without
    ``since``: all that is not zeroes."""

    size: int
    since: str | None = None
    extents: tuple[ChangedExtent, ...]
