"""One VM: a QEMU process, its monitor, its console and its guest agent.

This is the one face that the host agent talks to.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

from undercroft.hypervisor.console import ConsolePump
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.hypervisor.plan import MachinePlan
from undercroft.model.base import Model
from undercroft.model.vm import Instance


class RunState(StrEnum):
    """What the guest's processors are doing (the part of QEMU's RunState that matters)."""

    RUNNING = "running"
    PAUSED = "paused"
    IO_ERROR = "io-error"  # paused by QEMU: the host's disk failed or is full
    SHUTDOWN = "shutdown"  # the guest switched itself off; QEMU is about to end
    PANICKED = "guest-panicked"
    INCOMING = "inmigrate"
    SUSPENDING = "suspending"  # state being written out
    ENDED = "ended"


class MachineEvent(Model, frozen=True, kw_only=True):
    """Something that happened to the machine by itself.

    ``kind``: ``state`` (``state`` tells), ``io-error`` (``data``: node, operation, nospace),
    ``reset``, ``agent`` (``data``: connected), ``log-lost`` (console output dropped).
    """

    kind: str
    state: RunState
    time: float
    data: dict[str, Any] = {}


class ExitReport(Model, frozen=True, kw_only=True):
    """How QEMU ended. ``hint``: ``guest-shutdown``, ``guest-panic``, ``quit`` (we asked),
    ``suspended``, ``signal``, ``error`` (QEMU's own exit code ≠ 0), ``unknown``."""

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


class QemuMachine:
    """A running VM. Made by `start` or `adopt` only."""

    plan: MachinePlan  # machine_version and everything else as it was really started
    instance: Instance
    run_state: RunState
    console: ConsolePump  # .attach(scrollback) -> ConsoleSession; .write(); log on disk
    agent: GuestAgent | None  # None if plan.agent is False

    @classmethod
    async def start(
        cls, plan: MachinePlan, emulator: Emulator, *, on_event: EventHandler | None = None
    ) -> QemuMachine:
        """Starts QEMU; returns once its monitor answers (the guest runs by then).

        Raises:
            QemuStartError: with QEMU's last words; nothing is left behind.
        """

    @classmethod
    async def adopt(
        cls,
        instance: Instance,
        run_directory: Path,
        directory: Path,
        *,
        on_event: EventHandler | None = None,
    ) -> QemuMachine | None:
        """Takes over a QEMU that an earlier daemon started; None if it is not running any more
        (another process with its pid is not mistaken for it)."""

    async def pause(self) -> None:
        """Stops the guest's processors."""

    async def resume(self) -> None:
        """Lets them go on (also after an I/O error)."""

    async def power_button(self) -> None:
        """Presses it (ACPI); the guest may ignore it."""

    async def agent_shutdown(self, timeout: float = 5.0) -> None:
        """Asks the guest agent to switch off. Raises GuestAgentError if it does not answer."""

    async def reset(self) -> None:
        """Presses reset."""

    async def quit(self, timeout: float = 10.0) -> ExitReport:
        """Ends QEMU at once, its disks flushed; kills it if it does not end in time."""

    async def kill(self) -> ExitReport:
        """SIGKILL, and waits."""

    async def suspend(
        self, path: Path, progress: Callable[[float], None] | None = None
    ) -> ExitReport:
        """Writes the guest's state to ``path`` and ends QEMU. If anything fails the file is gone
        and the guest goes on as before.

        ``path`` + ".plan" keeps the plan it must be resumed with: `suspended_plan`.
        """

    async def screenshot(self) -> bytes:
        """PNG. Raises UnsupportedError without a display."""

    async def vnc(self) -> socket.socket:
        """A connected, non-blocking socket that speaks RFB. UnsupportedError without a display."""

    async def stats(self) -> MachineStats:
        """What the machine has used."""

    async def wait_exit(self) -> ExitReport:
        """Waits for the end of QEMU. A guest that switched itself off or panicked is seen to:
        QEMU is ended by itself then."""

    async def detach(self) -> None:
        """Lets go: closes connections and tasks, leaves QEMU running (daemon going down)."""


def suspended_plan(path: Path) -> MachinePlan:
    """The plan with which the state in ``path`` must be resumed (same hardware, same QEMU board).

    Raises:
        DataCorruptError: there is none, or it is damaged.
    """
