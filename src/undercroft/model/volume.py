"""Volumes: the disks of VMs."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from msgspec import structs

from undercroft.model.base import Model, Record, Spec
from undercroft.model.errors import InvalidError
from undercroft.model.layer import LayerFormat
from undercroft.model.units import TiB, format_size

MAX_VOLUME = 64 * TiB
SECTOR = 512


class VolumeState(StrEnum):
    """Life of a volume."""

    PENDING = "pending"
    READY = "ready"
    FAILED = "failed"
    REMOVING = "removing"


class IOLimits(Spec, frozen=True, kw_only=True):
    """What a guest may do with a disk per second; 0: no limit. Operations (``iops``) and bytes
    (``bandwidth``) of reading and writing together, or of either alone, but not both ways at once.
    ``burst``: for so many seconds it may do ten times as much, if it did less before.
    """

    iops: int = 0
    read_iops: int = 0
    write_iops: int = 0
    bandwidth: int = 0
    read_bandwidth: int = 0
    write_bandwidth: int = 0
    burst: int = 0


class VolumeSpec(Spec, frozen=True, kw_only=True):
    """What a volume should be.

    ``size`` in bytes as the guest sees it; ``image`` is the id of the image that it began as;
    ``host`` the id of the host it lies on; ``vm`` that of the VM that it goes with (None: it stands
    for itself); ``preallocated``: all its space is taken on the host from the beginning;
    ``source``: the volume (an id) that it was cloned from; ``format``: that of its first layer;
    ``datastore`` (an id): where it was to be, None: beside what it lies on, or in the data
    directory; ``encrypted``: so that nobody can read it who has only the disk that it is on.
    ``attached`` is the id of the VM that it is attached to, or about to be, which it outlives.
    """

    size: int
    image: str | None = None
    host: str
    vm: str | None = None
    preallocated: bool = False
    source: str | None = None
    format: LayerFormat = LayerFormat.QCOW2
    datastore: str | None = None
    encrypted: bool = False
    attached: str | None = None
    limits: IOLimits = IOLimits()

    @property
    def user(self) -> str | None:
        """The id of the VM that has it."""
        return self.attached or self.vm


class VolumeStatus(Model, frozen=True, kw_only=True):
    """``head`` is the id of the layer that it writes to (`undercroft.model.layer`); ``allocated``
    the space on the host that the layers take which only it needs, ``shared`` that of those
    beneath that others need too, in bytes; ``datastore`` is that (an id) which the head is in."""

    state: VolumeState = VolumeState.PENDING
    head: str = ""
    allocated: int = 0
    shared: int = 0
    datastore: str | None = None
    message: str | None = None


class Volume(Record, frozen=True, kw_only=True):
    """A volume. ``tasks`` are the ids of those that wait or run, in their order: of one that goes
    with a VM, only those that do not concern that VM."""

    kind: ClassVar[str] = "volume"
    spec: VolumeSpec
    status: VolumeStatus = VolumeStatus()
    tasks: tuple[str, ...] = ()


_MAX_LIMIT = 1 << 50


def check_limits(limits: IOLimits) -> IOLimits:
    """Returns limits that make sense unchanged.

    Raises:
        InvalidError: they do not.
    """
    if any(not 0 <= value <= _MAX_LIMIT for value in structs.astuple(limits)):
        raise InvalidError("a limit is a positive number, or 0 for none")
    for both, read, write in (
        (limits.iops, limits.read_iops, limits.write_iops),
        (limits.bandwidth, limits.read_bandwidth, limits.write_bandwidth),
    ):
        if both and (read or write):
            raise InvalidError(
                "a limit of reading and writing together excludes one of either alone",
                action="set the one to 0",
            )
    if 0 < limits.bandwidth < 64 << 10:
        raise InvalidError(
            f"a bandwidth of {limits.bandwidth} bytes per second would look like a broken disk",
            action="allow at least 64K",
        )
    if limits.burst > 3600:
        raise InvalidError("a burst lasts 3600 seconds at most")
    return limits


def check_volume_size(size: int) -> int:
    """Returns a valid volume size (bytes) unchanged.

    Raises:
        InvalidError: not positive, not whole sectors, or beyond `MAX_VOLUME`.
    """
    if size <= 0 or size > MAX_VOLUME:
        raise InvalidError(
            f"a disk of {format_size(size)} is not possible",
            action=f"choose a size from 1M to {format_size(MAX_VOLUME)}",
        )
    if size % SECTOR and size < 1 << 10:
        raise InvalidError(
            f"{size} means {size} bytes, and no disk is that small",
            action=f"did you mean {size}G?",
        )
    if size % SECTOR:
        raise InvalidError(
            f"a disk of {size} bytes is not a whole number of {SECTOR}-byte sectors",
            action="round the size to a multiple of 1M",
        )
    return size
