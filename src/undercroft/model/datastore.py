"""Datastores: where the disks of VMs are kept."""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar

from undercroft.model.base import Model, Record, Spec
from undercroft.model.errors import InvalidError

LOCAL = "local"
"""Name of the datastore in the data directory, which every host has."""

SLACK = 0.02
"""Of the capacity: by so much a datastore must be below a threshold that it had passed."""


class DatastoreDriver(StrEnum):
    """What a datastore is."""

    DIRECTORY = "directory"  # files in a directory of the host


class DatastoreState(StrEnum):
    """Life of a datastore."""

    READY = "ready"
    UNAVAILABLE = "unavailable"  # its directory is gone, or another file system is mounted there
    REMOVING = "removing"


class Fill(StrEnum):
    """How full a datastore is."""

    OK = "ok"
    WARNING = "warning"
    CRITICAL = "critical"


class DatastoreSpec(Spec, frozen=True, kw_only=True):
    """What a datastore should be. ``path`` is absolute, on the host with the id ``host``;
    ``builtin``: the one in the data directory; ``default``: what is put nowhere in particular is
    put there, which holds for exactly one; ``warning`` and ``critical``: of which part of its
    capacity (0 to 1) that is in use somebody is told."""

    driver: DatastoreDriver = DatastoreDriver.DIRECTORY
    host: str
    path: str
    builtin: bool = False
    default: bool = False
    warning: float = 0.80
    critical: float = 0.95


class DatastoreStatus(Model, frozen=True, kw_only=True):
    """What it is. Bytes: ``capacity`` and ``free`` of its file system, ``used`` what layers of
    volumes take of it, ``provisioned`` what guests see of the volumes in it, which may be more than
    there is; ``reflink``: its file system copies files by sharing their blocks."""

    state: DatastoreState = DatastoreState.READY
    capacity: int = 0
    free: int = 0
    used: int = 0
    provisioned: int = 0
    fill: Fill = Fill.OK
    reflink: bool = False
    message: str | None = None


class Datastore(Record, frozen=True, kw_only=True):
    """A datastore."""

    kind: ClassVar[str] = "datastore"
    spec: DatastoreSpec
    status: DatastoreStatus = DatastoreStatus()


def check_thresholds(warning: float, critical: float) -> None:
    """Does nothing if these are thresholds that make sense.

    Raises:
        InvalidError: they do not.
    """
    if not 0 < warning <= critical <= 1:
        raise InvalidError(
            f"thresholds of {warning:.0%} and {critical:.0%} make no sense",
            action="give shares of the capacity, the warning before the critical one: 0.8 and 0.95",
        )


def fill_of(spec: DatastoreSpec, capacity: int, free: int, before: Fill = Fill.OK) -> Fill:
    """How full a datastore is whose file system has ``free`` of ``capacity`` bytes left. What it
    was ``before`` ends only when it is `SLACK` below, so that nobody is told again and again."""
    share = 1 - free / capacity if capacity else 0.0
    for fill, threshold in ((Fill.CRITICAL, spec.critical), (Fill.WARNING, spec.warning)):
        reached = before is fill or before is Fill.CRITICAL
        if share >= threshold - (SLACK if reached else 0):
            return fill
    return Fill.OK
