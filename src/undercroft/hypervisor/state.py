"""What a machine is doing, what happens to it, and how it ends."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine
from enum import StrEnum
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

from undercroft.model.base import Model
from undercroft.model.errors import WrongStateError

__all__ = [
    "STOPPED",
    "EventHandler",
    "ExitReport",
    "MachineEvent",
    "MachineStats",
    "RunState",
    "needs",
]


class RunState(StrEnum):
    """What the guest's processors are doing (the part of QEMU's RunState that matters)."""

    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"  # paused by QEMU: the host's disk is full
    SHUTDOWN = "shutdown"  # the guest switched itself off; QEMU is about to end
    PANICKED = "guest-panicked"
    INCOMING = "inmigrate"  # its state is being read in
    SUSPENDING = "suspending"  # its state is being written out
    ENDED = "ended"

    @classmethod
    def from_qemu(cls, status: str) -> RunState:
        """From ``query-status``. What QEMU calls by other names is a pause to us."""
        try:
            return cls(status)
        except ValueError:
            return cls.PAUSED


STOPPED = (RunState.PAUSED, RunState.IO_ERROR)
"""A guest whose processors stand still, and can go on."""


class MachineEvent(Model, frozen=True, kw_only=True):
    """Something that happened to the machine.

    ``kind``: ``state`` (``state`` tells), ``io-error`` (``data``: device, operation, no_space),
    ``reset``, ``agent`` (``data``: connected), ``log-lost`` (console output dropped, ``data``:
    bytes), ``monitor-lost`` (QEMU's monitor hung up; its end follows, as a rule).
    """

    kind: str
    state: RunState
    time: float
    data: dict[str, Any] = {}


class ExitReport(Model, frozen=True, kw_only=True):
    """How QEMU ended. ``hint``: ``guest-shutdown``, ``guest-panic``, ``quit`` (we asked),
    ``killed`` (we killed it), ``suspended``, ``signal`` (ended by one from outside), ``error``
    (QEMU gave up by itself), ``unknown`` (nobody saw). ``message``: QEMU's last words."""

    hint: str
    time: float
    code: int | None = None
    signal: int | None = None
    message: str = ""


class MachineStats(Model, frozen=True, kw_only=True):
    """Counters since the start (bytes, seconds); ``memory`` is what QEMU holds on the host,
    ``guest_memory`` what the balloon leaves the guest (None without one)."""

    cpu_seconds: float = 0.0
    memory: int = 0
    guest_memory: int | None = None
    disk_read_bytes: int = 0
    disk_write_bytes: int = 0
    disk_reads: int = 0
    disk_writes: int = 0


EventHandler = Callable[[MachineEvent], None]
"""Called on the event loop; must not block or raise."""


class _Stateful(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def run_state(self) -> RunState: ...


_S = TypeVar("_S", bound=_Stateful)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_Method = Callable[Concatenate[_S, _P], Coroutine[Any, Any, _R]]


def needs(*states: RunState) -> Callable[[_Method[_S, _P, _R]], _Method[_S, _P, _R]]:
    """Decorates a method that works in certain run states only.

    In any other it raises `WrongStateError`, whose ``data`` carries ``state`` and ``needed``.
    """

    def decorate(method: _Method[_S, _P, _R]) -> _Method[_S, _P, _R]:
        @functools.wraps(method)
        async def guarded(machine: _S, *args: _P.args, **kwargs: _P.kwargs) -> _R:
            if machine.run_state not in states:
                wanted = " or ".join(states)
                raise WrongStateError(
                    f"vm {machine.name} is {machine.run_state.value}, not {wanted}",
                    object=f"vm {machine.name}",
                    state=machine.run_state.value,
                    needed=[state.value for state in states],
                )
            return await method(machine, *args, **kwargs)

        return cast("_Method[_S, _P, _R]", guarded)

    return decorate
