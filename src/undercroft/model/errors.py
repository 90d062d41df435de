"""Every error a user can meet, each with a stable code.

A message says what was wrong and which object; ``action`` says what to do about it. The code
never changes once released, so that programs can act on it.

    UndercroftError            internal            500
    ├── InvalidError           invalid             400
    │   └── HostileImageError  image-refused       400
    ├── UnauthenticatedError   unauthenticated     401
    ├── ForbiddenError         forbidden           403
    ├── NotFoundError          not-found           404
    ├── ConflictError          conflict            409
    │   ├── AlreadyExistsError already-exists      409
    │   ├── InUseError         in-use              409
    │   ├── WrongStateError    wrong-state         409
    │   └── BusyError          busy                409
    ├── CancelledTaskError     cancelled           409
    ├── CompactedError         compacted           410
    ├── StaleError             stale               412
    ├── TooLargeError          too-large           413
    ├── UnsupportedError       unsupported         501
    ├── HypervisorError        hypervisor          502
    │   ├── QemuStartError     qemu-start          502
    │   ├── QmpError           qmp                 502
    │   └── GuestAgentError    guest-agent         502
    │       └── NoProgramError no-program          502
    ├── ProgramError           program             502
    ├── FetchError             fetch               502
    │   └── ChecksumError      checksum            502
    ├── UnavailableError       unavailable         503
    │   └── DaemonError        daemon              503
    ├── TimeLimitError         time-limit          504
    ├── MissingToolError       missing-tool        501
    ├── NoSpaceError           no-space            507
    └── DataError              data                500
        ├── DataNewerError     data-newer          500
        ├── DataLockedError    data-locked         409
        └── DataCorruptError   data-corrupt        500
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

__all__ = [
    "AlreadyExistsError",
    "BusyError",
    "CancelledTaskError",
    "ChecksumError",
    "CompactedError",
    "ConflictError",
    "DaemonError",
    "DataCorruptError",
    "DataError",
    "DataLockedError",
    "DataNewerError",
    "FetchError",
    "ForbiddenError",
    "GuestAgentError",
    "HostileImageError",
    "HypervisorError",
    "InUseError",
    "InvalidError",
    "MissingToolError",
    "NoProgramError",
    "NoSpaceError",
    "NotFoundError",
    "Problem",
    "ProgramError",
    "QemuStartError",
    "QmpError",
    "StaleError",
    "TimeLimitError",
    "TooLargeError",
    "UnauthenticatedError",
    "UnavailableError",
    "UndercroftError",
    "UnsupportedError",
    "WrongStateError",
    "error_classes",
    "error_from_problem",
]


class Problem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as a value: stored in tasks and sent as ``application/problem+json`` (RFC 9457).

    ``type`` is ``urn:undercroft:error:<code>``; ``detail`` is the message; ``object`` names what it
    is about (for instance ``vm web1``); ``action`` says what to do.
    """

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    object: str | None = None
    action: str | None = None
    data: dict[str, Any] = {}


class UndercroftError(Exception):
    """Root of the tree; raised itself only for a fault of Undercroft's own."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    title: ClassVar[str] = "Internal error"

    def __init__(
        self,
        message: str,
        *,
        object: str | None = None,
        action: str | None = None,
        **data: Any,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.object = object
        self.action = action
        self.data = data

    def problem(self) -> Problem:
        """This error as a value that can be stored and sent."""
        return Problem(
            type=f"urn:undercroft:error:{self.code}",
            title=self.title,
            status=self.status,
            code=self.code,
            detail=self.message,
            object=self.object,
            action=self.action,
            data=self.data,
        )


class InvalidError(UndercroftError):
    """What was asked for makes no sense, whatever the state of the world."""

    code, status, title = "invalid", 400, "Invalid request"


class HostileImageError(InvalidError):
    """An image that is malformed, or that tries to reach beyond itself."""

    code, status, title = "image-refused", 400, "Image refused"


class UnauthenticatedError(UndercroftError):
    """The caller has not shown who they are."""

    code, status, title = "unauthenticated", 401, "Not authenticated"


class ForbiddenError(UndercroftError):
    """The caller lacks the privilege."""

    code, status, title = "forbidden", 403, "Forbidden"


class NotFoundError(UndercroftError):
    """No such object."""

    code, status, title = "not-found", 404, "Not found"


class ConflictError(UndercroftError):
    """The request collides with the present state, or with another change made meanwhile."""

    code, status, title = "conflict", 409, "Conflict"


class AlreadyExistsError(ConflictError):
    """The name is taken."""

    code, status, title = "already-exists", 409, "Already exists"


class InUseError(ConflictError):
    """Something else still needs the object."""

    code, status, title = "in-use", 409, "In use"


class WrongStateError(ConflictError):
    """The object is in a state in which this cannot be done; ``data`` carries both states."""

    code, status, title = "wrong-state", 409, "Wrong state"


class BusyError(ConflictError):
    """Too much is already waiting on this object."""

    code, status, title = "busy", 409, "Busy"


class CancelledTaskError(UndercroftError):
    """The task was cancelled before it was done."""

    code, status, title = "cancelled", 409, "Cancelled"


class CompactedError(UndercroftError):
    """The history before this revision is no longer kept: list again, then watch from there."""

    code, status, title = "compacted", 410, "History compacted"


class StaleError(UndercroftError):
    """The object changed since the caller read it (If-Match)."""

    code, status, title = "stale", 412, "Changed meanwhile"


class TooLargeError(UndercroftError):
    """Larger than the limit."""

    code, status, title = "too-large", 413, "Too large"


class UnsupportedError(UndercroftError):
    """This host, QEMU version or machine type cannot do it."""

    code, status, title = "unsupported", 501, "Not supported"


class MissingToolError(UnsupportedError):
    """A program that this needs is not installed."""

    code, status, title = "missing-tool", 501, "Program missing"


class HypervisorError(UndercroftError):
    """QEMU, or something beneath a VM, failed."""

    code, status, title = "hypervisor", 502, "Hypervisor failed"


class QemuStartError(HypervisorError):
    """QEMU would not start; the message carries what it said last."""

    code, status, title = "qemu-start", 502, "QEMU did not start"


class QmpError(HypervisorError):
    """QEMU refused a monitor command, or its monitor went away."""

    code, status, title = "qmp", 502, "QEMU refused"


class GuestAgentError(HypervisorError):
    """The guest agent is absent, silent, or refused."""

    code, status, title = "guest-agent", 502, "Guest agent"


class NoProgramError(GuestAgentError):
    """What is to be run in a guest is not there, or is no program."""

    code, status, title = "no-program", 502, "No such program"


class ProgramError(UndercroftError):
    """A helper program failed; the message carries what it said last."""

    code, status, title = "program", 502, "Helper program failed"


class FetchError(UndercroftError):
    """A download failed."""

    code, status, title = "fetch", 502, "Download failed"


class ChecksumError(FetchError):
    """What arrived is not what was announced."""

    code, status, title = "checksum", 502, "Checksum mismatch"


class UnavailableError(UndercroftError):
    """It cannot be reached now; trying again later may help."""

    code, status, title = "unavailable", 503, "Unavailable"


class DaemonError(UnavailableError):
    """No daemon answers, or it could not be started."""

    code, status, title = "daemon", 503, "Daemon unavailable"


class TimeLimitError(UndercroftError):
    """It took longer than it may."""

    code, status, title = "time-limit", 504, "Time limit passed"


class NoSpaceError(UndercroftError):
    """A disk, or another resource, is full."""

    code, status, title = "no-space", 507, "No space"


class DataError(UndercroftError):
    """Something is wrong with the data directory."""

    code, status, title = "data", 500, "Data directory"


class DataNewerError(DataError):
    """The data directory was written by a newer Undercroft."""

    code, status, title = "data-newer", 500, "Data from a newer version"


class DataLockedError(DataError):
    """Another daemon holds the data directory."""

    code, status, title = "data-locked", 409, "Data directory in use"


class DataCorruptError(DataError):
    """The data directory holds something that Undercroft did not write."""

    code, status, title = "data-corrupt", 500, "Data damaged"


def error_classes() -> dict[str, type[UndercroftError]]:
    """All error classes by code.

    Raises:
        RuntimeError: two classes claim one code (a fault of the programmer).
    """
    found: dict[str, type[UndercroftError]] = {}
    pending: list[type[UndercroftError]] = [UndercroftError]
    while pending:
        cls = pending.pop()
        if cls.code in found:
            raise RuntimeError(f"error code {cls.code} is claimed twice")
        found[cls.code] = cls
        pending.extend(cls.__subclasses__())
    return found


def error_from_problem(problem: Problem) -> UndercroftError:
    """The exception for a problem that came over the wire or out of a task.

    An unknown code (a newer server) becomes an `UndercroftError` that still carries it.
    """
    cls = error_classes().get(problem.code, UndercroftError)
    error = cls(problem.detail, object=problem.object, action=problem.action)
    error.data = dict(problem.data)  # not as keywords: whose names the other side chose
    if cls.code != problem.code:
        error.code = problem.code  # type: ignore[misc]
        error.status = problem.status  # type: ignore[misc]
        error.title = problem.title  # type: ignore[misc]
    return error
