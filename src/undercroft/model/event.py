"""Events: what happened, for people and for programs that follow along."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from undercroft.model.base import Record, Ref


class EventLevel(StrEnum):
    """How much an administrator should care."""

    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class Event(Record, frozen=True, kw_only=True):
    """Something that happened to ``object`` at ``meta.created``.

    ``type`` is stable (``vm.started``, ``vm.crashed``, ``image.ready``, …); ``message`` is for
    people. Events are kept in bounded number, oldest dropped first.
    """

    kind: ClassVar[str] = "event"
    type: str
    object: Ref
    level: EventLevel = EventLevel.INFO
    message: str
    by: str = "system"
    task: str | None = None
    data: dict[str, Any] = {}
