"""Tasks: operations under way, with progress and outcome."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, ClassVar

from undercroft.model.base import Model, Record, Ref, Spec
from undercroft.model.errors import Problem


class TaskState(StrEnum):
    """Life of a task; the last three are final."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def final(self) -> bool:
        """Whether nothing will follow."""
        return self in (TaskState.SUCCEEDED, TaskState.FAILED, TaskState.CANCELLED)


class TaskSpec(Spec, frozen=True, kw_only=True):
    """``verb`` is the operation (``vm.start``); ``object`` what it acts on; ``host`` the id of the
    host whose agent carries it out; ``cancel`` asks it to stop."""

    verb: str
    object: Ref
    host: str
    arguments: dict[str, Any] = {}
    by: str = "system"
    cancel: bool = False


class TaskStatus(Model, frozen=True, kw_only=True):
    """``progress`` runs from 0 to 1, or is None where it cannot be known; ``phase`` says in words
    what is being done; ``checkpoint`` is what the agent needs to carry on after its own death."""

    state: TaskState = TaskState.PENDING
    progress: float | None = None
    phase: str = ""
    started: float | None = None
    finished: float | None = None
    error: Problem | None = None
    result: dict[str, Any] = {}
    checkpoint: dict[str, Any] = {}


class Task(Record, frozen=True, kw_only=True):
    """A task. Its name is its id."""

    kind: ClassVar[str] = "task"
    spec: TaskSpec
    status: TaskStatus = TaskStatus()
