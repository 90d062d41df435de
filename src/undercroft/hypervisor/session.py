"""A running QEMU as we hold it: its process, monitor, output, console and guest agent.

What happens to it by itself is seen here: events, and its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from undercroft.hypervisor.console import ConsolePump
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.hypervisor.helper import GuestHelper
from undercroft.hypervisor.launch import clean_run_directory
from undercroft.hypervisor.output import OutputLog
from undercroft.hypervisor.plan import MachinePlan
from undercroft.hypervisor.process import ExitStatus, Process, boot_id
from undercroft.hypervisor.qmp import Monitor, MonitorEvent
from undercroft.hypervisor.state import EventHandler, ExitReport, MachineEvent, RunState
from undercroft.model.errors import (
    HypervisorError,
    QmpError,
    TimeLimitError,
    UndercroftError,
)
from undercroft.model.vm import Instance

__all__ = ["END_TIMEOUT", "FINAL", "MachineSession"]

END_TIMEOUT = 10.0  # seconds that QEMU gets to flush its disks and end

_HELPER_TIMEOUT = 2.0
FINAL = (RunState.SHUTDOWN, RunState.PANICKED)


class MachineSession:
    """What `QemuMachine` stands on.

    ``plan`` is as it was really started (``machine_version`` filled in); ``agent`` is None if the
    plan has no agent channel; ``helper`` while its port is open.
    """

    plan: MachinePlan
    instance: Instance
    run_state: RunState
    console: ConsolePump
    agent: GuestAgent | None
    helper: GuestHelper | None

    def __init__(
        self,
        plan: MachinePlan,
        process: Process,
        output: OutputLog,
        on_event: EventHandler | None,
        helpers: Sequence[Process] = (),
    ) -> None:
        self.plan = plan
        self.run_state = RunState.INCOMING if plan.incoming else RunState.RUNNING
        self.agent = GuestAgent(self.name, self._run / "agent.sock") if plan.agent else None
        self.helper = None
        self._process = process
        self._helpers = helpers
        self._output = output
        self._on_event = on_event
        self._monitor = Monitor(f"vm {plan.name}", self._handle, self._on_monitor_closed)
        self._hint: str | None = None
        self._asked: str | None = None
        self._report: ExitReport | None = None
        self._watcher: asyncio.Task[ExitReport] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._detached = False
        self._brief = False  # the guest is to stand still for milliseconds, which is no pause

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.plan.name

    @property
    def _run(self) -> Path:
        return Path(self.plan.run_directory)

    def open_helper(self) -> None:
        """Opens the port of the guest's helper.

        Raises:
            OSError: it has none, or somebody else has it.
        """
        if self.helper is None:
            self.helper = GuestHelper.connect(f"vm {self.name}", self._run)

    def close_helper(self) -> None:
        """Closes it: a helper that waits in the guest ends."""
        if self.helper is not None:
            self.helper.close()
            self.helper = None

    async def _connect(self, connection: socket.socket, timeout: float) -> None:
        """Opens the monitor's session; gives up as soon as QEMU ends.

        Raises:
            QmpError, TimeLimitError: no session.
        """
        connecting = asyncio.ensure_future(self._monitor.connect(connection, timeout=timeout))
        ended = asyncio.ensure_future(self._process.wait())
        try:
            await asyncio.wait((connecting, ended), return_when=asyncio.FIRST_COMPLETED)
            if not connecting.done():
                raise QmpError(f"QEMU of vm {self.name} ended")
            await connecting
        finally:
            ended.cancel()
            if not connecting.done():
                connecting.cancel()
                with contextlib.suppress(asyncio.CancelledError, UndercroftError):
                    await connecting

    def _make_instance(self, process: Process, qemu: str) -> Instance:
        plan = self.plan
        return Instance(
            pid=process.pid,
            start_ticks=process.start_ticks,
            host_boot=boot_id(),
            uid=plan.uid if plan.uid is not None else os.getuid(),
            started=time.time(),
            accelerator=plan.accelerator,
            qemu=qemu,
            cpus=plan.cpus,
            memory=plan.memory,
            generation=plan.generation,
        )

    def _open_console(self, connection: socket.socket, *, fresh: bool) -> ConsolePump:
        return ConsolePump(
            connection,
            Path(self.plan.directory),
            self.plan.logs,
            fresh=fresh,
            on_lost=lambda size: self._emit("log-lost", bytes=size),
        )

    async def _learn_state(self) -> None:
        """Asks what happened before we listened, and acts on it."""
        status = (await self._monitor.execute("query-status"))["status"]
        for device in await self._monitor.execute("query-chardev"):
            if device["label"] == "agent" and self.agent is not None:
                self.agent.channel.present = bool(device["frontend-open"])
        state = RunState.from_qemu(status)
        if self._hint is None:
            self.run_state = state
            self._see_final(state)

    # What happens

    def _handle(self, event: MonitorEvent) -> None:
        data: Mapping[str, Any] = event.get("data", {})
        match event["event"]:
            case "STOP" if not self._brief:
                if self.run_state in (RunState.RUNNING, RunState.INCOMING):
                    self._set_state(RunState.PAUSED)
            case "RESUME":
                self._set_state(RunState.RUNNING)
            case "SHUTDOWN" if data.get("guest"):
                self._set_state(RunState.SHUTDOWN)
            case "GUEST_PANICKED":
                self._set_state(RunState.PANICKED)
            case "BLOCK_IO_ERROR" if data.get("action") == "stop":
                self._set_state(RunState.IO_ERROR)
                self._emit(
                    "io-error",
                    device=data.get("qom-path", data.get("device", "")),
                    operation=data.get("operation", ""),
                    no_space=bool(data.get("nospace")),
                )
            case "RESET" if data.get("guest"):
                self._emit("reset")
            case "VSERPORT_CHANGE" if data.get("id") == "agent-port":
                self._see_agent(bool(data.get("open")))
            case _:
                pass

    def _set_state(self, state: RunState) -> None:
        if self.run_state is state or self.run_state in (*FINAL, RunState.ENDED):
            return
        self.run_state = state
        self._emit("state")
        self._see_final(state)

    def _see_final(self, state: RunState) -> None:
        """A guest that is over: QEMU was told to wait, so that we learn why; now it may go."""
        if state in FINAL and self._hint is None:
            self._hint = "guest-shutdown" if state is RunState.SHUTDOWN else "guest-panic"
            self._ending = asyncio.create_task(self._end())

    def _see_agent(self, present: bool) -> None:
        if self.agent is not None:
            self.agent.channel.present = present
            self._emit("agent", connected=present)

    def _emit(self, kind: str, **data: Any) -> None:
        if self._on_event is not None and not self._detached:
            self._on_event(
                MachineEvent(kind=kind, state=self.run_state, time=time.time(), data=data)
            )

    def _on_monitor_closed(self) -> None:
        if not self._detached and self._asked is None and self._hint is None:
            self._emit("monitor-lost")

    async def _watch(self) -> ExitReport:
        """Waits for QEMU's end, and tidies up after it."""
        status = await self._process.wait()
        # What it sent before it died is still in the sockets: first its events, then its output.
        await self._monitor.drain()
        self._output.finish()
        await self.console.finish()
        if self.agent is not None:
            await self.agent.close()
        self.close_helper()
        await self._end_helpers()
        await asyncio.to_thread(clean_run_directory, self._run)
        self._report = self._make_report(status)
        self.run_state = RunState.ENDED
        self._emit("state")
        return self._report

    async def _end_helpers(self) -> None:
        """They end with QEMU by themselves; this reaps them, and sees to it."""
        for helper in self._helpers:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(helper.wait(), _HELPER_TIMEOUT)
                continue
            helper.signal(signal.SIGKILL)
            await helper.wait()

    def _make_report(self, status: ExitStatus) -> ExitReport:
        words = self._output.last_words
        if self._hint is not None:
            hint = self._hint
        elif self._asked is not None:
            hint = self._asked
        elif status.signal is not None or "terminating on signal" in words:
            hint = "signal"
        elif status.code is not None:
            hint = "error"
        else:
            hint = "unknown"
        return ExitReport(
            hint=hint, time=time.time(), code=status.code, signal=status.signal, message=words
        )

    async def wait_exit(self) -> ExitReport:
        """Waits for the end of QEMU. A guest that switched itself off or panicked is seen to:
        QEMU is ended by itself then."""
        if self._watcher is None or self._detached:
            raise HypervisorError(f"vm {self.name} is not being watched")
        return await asyncio.shield(self._watcher)

    async def _end(self, timeout: float = END_TIMEOUT) -> None:
        """Lets QEMU end: by its monitor, else SIGTERM, else SIGKILL."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        with contextlib.suppress(QmpError, TimeLimitError):
            await self._monitor.execute("quit", timeout=timeout / 2)
        for number in (signal.SIGTERM, signal.SIGKILL):
            remaining = max(deadline - loop.time(), 0.05)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._process.wait()), remaining)
                return
            deadline = loop.time() + 2.0
            self._process.signal(number)
        await self._process.wait()

    async def detach(self) -> None:
        """Lets go: closes connections and tasks, leaves QEMU running (daemon going down)."""
        self._detached = True
        for task in (self._watcher, self._ending):
            if task is not None and not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        await self._monitor.close()
        if hasattr(self, "console"):
            await self.console.close()
        if self.agent is not None:
            await self.agent.close()
        self._output.close()
        self.close_helper()
        for process in (self._process, *self._helpers):
            process.detach()

    async def _give_up(self) -> ExitReport:
        """After a failed start: ends what there is, and says how it ended."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())
        if self._process.alive:
            # It may just be ending by itself, and have something to say about it.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._watcher), 0.5)
            self._process.signal(signal.SIGKILL)
        return await self._watcher
