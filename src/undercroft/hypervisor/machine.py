"""One VM: a QEMU process, its monitor, its console and its guest agent.

This is the one face that the host agent talks to.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from undercroft.hypervisor import sockets
from undercroft.hypervisor.board import machine_version
from undercroft.hypervisor.commandline import command_line
from undercroft.hypervisor.console import ConsolePump
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.firmware import find_firmware
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.hypervisor.launch import (
    Launch,
    clean_run_directory,
    launch,
    open_output,
    read_plan,
)
from undercroft.hypervisor.measure import measure
from undercroft.hypervisor.output import OutputLog
from undercroft.hypervisor.plan import MachinePlan
from undercroft.hypervisor.process import ExitStatus, Process, boot_id
from undercroft.hypervisor.qmp import Monitor, MonitorEvent
from undercroft.hypervisor.screen import open_vnc, take_screenshot
from undercroft.hypervisor.state import (
    EventHandler,
    ExitReport,
    MachineEvent,
    MachineStats,
    RunState,
    needs,
)
from undercroft.hypervisor.suspend import load_state, save_state, suspended_plan
from undercroft.model.errors import (
    GuestAgentError,
    HypervisorError,
    QemuStartError,
    QmpError,
    TimeLimitError,
    UndercroftError,
)
from undercroft.model.vm import Display, Firmware, Instance

__all__ = [
    "EventHandler",
    "ExitReport",
    "MachineEvent",
    "MachineStats",
    "QemuMachine",
    "RunState",
    "suspended_plan",
]

_START_TIMEOUT = 60.0
_ADOPT_TIMEOUT = 20.0
_END_TIMEOUT = 10.0

_ALIVE = (
    RunState.RUNNING,
    RunState.PAUSED,
    RunState.IO_ERROR,
    RunState.SHUTDOWN,
    RunState.PANICKED,
    RunState.INCOMING,
    RunState.SUSPENDING,
)
_STOPPED = (RunState.PAUSED, RunState.IO_ERROR)
_FINAL = (RunState.SHUTDOWN, RunState.PANICKED)


class QemuMachine:
    """A running VM. Made by `start` or `adopt` only.

    ``plan`` is as it was really started (``machine_version`` filled in); ``agent`` is None if the
    plan has no agent channel.
    """

    plan: MachinePlan
    instance: Instance
    run_state: RunState
    console: ConsolePump
    agent: GuestAgent | None

    def __init__(
        self,
        plan: MachinePlan,
        process: Process,
        output: OutputLog,
        on_event: EventHandler | None,
    ) -> None:
        self.plan = plan
        self.run_state = RunState.INCOMING if plan.incoming else RunState.RUNNING
        self.agent = GuestAgent(self.name, self._run / "agent.sock") if plan.agent else None
        self._process = process
        self._output = output
        self._on_event = on_event
        self._monitor = Monitor(f"vm {plan.name}", self._handle, self._on_monitor_closed)
        self._hint: str | None = None
        self._asked: str | None = None
        self._report: ExitReport | None = None
        self._watcher: asyncio.Task[ExitReport] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._detached = False

    @property
    def name(self) -> str:
        """The VM's name."""
        return self.plan.name

    @property
    def _run(self) -> Path:
        return Path(self.plan.run_directory)

    # Beginning

    @classmethod
    async def start(
        cls, plan: MachinePlan, emulator: Emulator, *, on_event: EventHandler | None = None
    ) -> QemuMachine:
        """Starts QEMU; returns once its monitor answers (the guest runs by then), or once the
        state in ``plan.incoming`` is loaded and the guest goes on.

        Raises:
            QemuStartError: with QEMU's last words; nothing is left behind.
            InvalidError, UnsupportedError: no such machine can be.
        """
        version = machine_version(plan, emulator.version)
        plan = msgspec.structs.replace(plan, machine_version=version)
        firmware = None
        if plan.firmware is Firmware.UEFI:
            firmware = find_firmware(plan.arch, plan.machine, secure_boot=plan.secure_boot)
        line = command_line(plan, emulator, firmware)
        launching = asyncio.ensure_future(asyncio.to_thread(launch, plan, line, firmware))
        try:
            launched = await asyncio.shield(launching)
        except asyncio.CancelledError:
            # The thread cannot be stopped: wait for what it starts, and end that.
            with contextlib.suppress(UndercroftError):
                await _abandon(await launching, plan)
            raise
        machine = cls(plan, launched.process, OutputLog.of(launched.output, plan), on_event)
        try:
            await machine._come_up(launched, emulator)
        except BaseException as error:
            report = await asyncio.shield(machine._give_up())
            if isinstance(error, asyncio.CancelledError):
                raise
            raise _start_error(plan, error, report) from error
        return machine

    async def _come_up(self, launched: Launch, emulator: Emulator) -> None:
        self.instance = self._make_instance(launched.process, emulator.version_text)
        self.console = self._open_console(launched.connections["serial"], fresh=True)
        self._watcher = asyncio.create_task(self._watch())
        await self._connect(launched.connections["qmp"], _START_TIMEOUT)
        if self.plan.incoming is not None:
            await load_state(self._monitor, Path(self.plan.incoming))
            await self._monitor.execute("cont")
        await self._learn_state()

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

    @classmethod
    async def adopt(
        cls,
        instance: Instance | None,
        run_directory: Path,
        directory: Path,
        *,
        on_event: EventHandler | None = None,
    ) -> QemuMachine | None:
        """Takes over a QEMU that an earlier daemon started; None if it is not running any more
        (another process with its pid is not mistaken for it).

        Without an ``instance`` (the daemon died before it wrote it down) it is whoever serves the
        monitor socket in the run directory.

        Raises:
            QmpError, TimeLimitError: it runs, but its monitor does not answer: it can only be
                killed (`kill_instance`).
        """
        try:
            plan = await asyncio.to_thread(read_plan, run_directory)
            connection = sockets.connect(run_directory / "qmp.sock")
        except (OSError, msgspec.MsgspecError):
            return None
        process = _identify(instance, connection)
        if process is None:
            connection.close()
            return None
        plan = msgspec.structs.replace(
            plan, directory=str(directory), run_directory=str(run_directory)
        )
        output = OutputLog.of(open_output(run_directory), plan)
        machine = cls(plan, process, output, on_event)
        try:
            machine.instance = instance or machine._make_instance(process, "")
            serial = sockets.connect(run_directory / "serial.sock")
            machine.console = machine._open_console(serial, fresh=False)
            machine._watcher = asyncio.create_task(machine._watch())
            await machine._connect(connection, _ADOPT_TIMEOUT)
            if instance is None:
                text = ".".join(map(str, machine._monitor.version))
                machine.instance = msgspec.structs.replace(machine.instance, qemu=text)
            await machine._learn_state()
        except BaseException:
            gone = not process.alive
            await machine.detach()
            if gone:
                return None
            raise
        return machine

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
        if status in ("finish-migrate", "postmigrate"):
            # A daemon died while suspending: the file is not there, the guest is still whole.
            with contextlib.suppress(QmpError):
                await self._monitor.execute("migrate_cancel")
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
            case "STOP":
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
            case "VSERPORT_CHANGE":
                self._see_agent(bool(data.get("open")))
            case _:
                pass

    def _set_state(self, state: RunState) -> None:
        if self.run_state is state or self.run_state in (*_FINAL, RunState.ENDED):
            return
        self.run_state = state
        self._emit("state")
        self._see_final(state)

    def _see_final(self, state: RunState) -> None:
        """A guest that is over: QEMU was told to wait, so that we learn why; now it may go."""
        if state in _FINAL and self._hint is None:
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
        if self._report is None and not self._detached:
            self._emit("monitor-lost")

    async def _watch(self) -> ExitReport:
        """Waits for QEMU's end, and tidies up after it."""
        status = await self._process.wait()
        # What it sent before it died is still in the sockets: first its events, then its output.
        await self._monitor.close()
        self._output.finish()
        await self.console.finish()
        if self.agent is not None:
            await self.agent.close()
        await asyncio.to_thread(clean_run_directory, self._run)
        self._report = self._make_report(status)
        self.run_state = RunState.ENDED
        self._emit("state")
        return self._report

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
        if self._watcher is None:
            raise HypervisorError(f"vm {self.name} is not being watched")
        return await asyncio.shield(self._watcher)

    # What can be done

    @needs(RunState.RUNNING)
    async def pause(self) -> None:
        """Stops the guest's processors."""
        await self._monitor.execute("stop")
        self._set_state(RunState.PAUSED)

    @needs(*_STOPPED)
    async def resume(self) -> None:
        """Lets them go on (also after an I/O error, which comes again if nothing changed)."""
        await self._monitor.execute("cont")

    @needs(RunState.RUNNING)
    async def power_button(self) -> None:
        """Presses it (ACPI); the guest may ignore it."""
        await self._monitor.execute("system_powerdown")

    @needs(RunState.RUNNING)
    async def agent_shutdown(self, timeout: float = 5.0) -> None:
        """Asks the guest agent to switch off.

        Raises:
            GuestAgentError, TimeLimitError: there is none, or it does not answer.
        """
        agent = self._need_agent()
        await agent.shutdown(timeout)

    @needs(RunState.RUNNING, *_STOPPED)
    async def reset(self) -> None:
        """Presses reset."""
        await self._monitor.execute("system_reset")
        if self.run_state in _STOPPED:
            await self._monitor.execute("cont")

    async def quit(self, timeout: float = _END_TIMEOUT) -> ExitReport:
        """Ends QEMU at once, its disks flushed; kills it if it does not end in time."""
        self._asked = self._asked or "quit"
        await self._end(timeout)
        return await self.wait_exit()

    async def kill(self) -> ExitReport:
        """SIGKILL, and waits."""
        self._asked = self._asked or "killed"
        self._process.signal(signal.SIGKILL)
        return await self.wait_exit()

    async def _end(self, timeout: float = _END_TIMEOUT) -> None:
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

    @needs(RunState.RUNNING, *_STOPPED)
    async def suspend(
        self, path: Path, progress: Callable[[float], None] | None = None
    ) -> ExitReport:
        """Writes the guest's state to ``path`` and ends QEMU. If anything fails (also if it is
        cancelled) the file is gone and the guest goes on as before.

        ``path`` + ".plan" keeps the plan it must be resumed with: `suspended_plan`.

        Raises:
            NoSpaceError, QmpError, TimeLimitError: it did not work.
        """
        before = self.run_state
        self._set_state(RunState.SUSPENDING)
        try:
            if before is RunState.RUNNING:
                await self._monitor.execute("stop")
            await save_state(self._monitor, self.plan, path, progress)
        except BaseException:
            if self.run_state is RunState.SUSPENDING:
                self._set_state(RunState.PAUSED if before is RunState.RUNNING else before)
            if before is RunState.RUNNING and self._monitor.connected:
                with contextlib.suppress(QmpError, TimeLimitError):
                    await asyncio.shield(self._monitor.execute("cont"))
            raise
        self._asked = "suspended"
        return await self.quit()

    @needs(*_ALIVE)
    async def screenshot(self) -> bytes:
        """The display as PNG.

        Raises:
            UnsupportedError: it has none.
        """
        return await take_screenshot(self._monitor, self.plan.display is not Display.NONE)

    @needs(*_ALIVE)
    async def vnc(self) -> socket.socket:
        """A connected, non-blocking socket that speaks RFB (RFC 6143), without authentication:
        whoever has the socket has the display.

        Raises:
            UnsupportedError: it has no display.
        """
        return await open_vnc(self._monitor, self.plan.display is not Display.NONE)

    @needs(*_ALIVE)
    async def stats(self) -> MachineStats:
        """What the machine has used."""
        return await measure(self._monitor, self._process, balloon=self.plan.balloon)

    def _need_agent(self) -> GuestAgent:
        if self.agent is None:
            raise GuestAgentError(f"vm {self.name} has no channel to a guest agent")
        return self.agent

    # Ending

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
        self._process.detach()

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


def _identify(instance: Instance | None, connection: socket.socket) -> Process | None:
    """The process that an instance means, if it is still that one."""
    if instance is None:
        return Process.open(sockets.peer(connection)[0])
    if instance.host_boot != boot_id():
        return None
    return Process.open(instance.pid, instance.start_ticks)


def _start_error(plan: MachinePlan, error: BaseException, report: ExitReport) -> Exception:
    """Why a start failed: QEMU's own words if it had any."""
    reason = report.message or (error.message if isinstance(error, UndercroftError) else str(error))
    return QemuStartError(
        f"QEMU of vm {plan.name} did not start: {reason}",
        object=f"vm {plan.name}",
        action=_advice(reason),
        exit_code=report.code,
        signal=report.signal,
    )


def _advice(reason: str) -> str | None:
    if "host forwarding rule" in reason:
        return "choose another host port: this one is taken, or not allowed to this user"
    if "Cannot allocate memory" in reason or "cannot set up guest memory" in reason:
        return "give the VM less memory, or stop others"
    if "Failed to get" in reason and "lock" in reason:
        return "another process has the disk open: stop it first"
    return None


async def _abandon(launched: Launch, plan: MachinePlan) -> None:
    """Ends a QEMU whose start was cancelled."""
    launched.process.signal(signal.SIGKILL)
    for connection in launched.connections.values():
        connection.close()
    os.close(launched.output)
    await launched.process.wait()
    await asyncio.to_thread(clean_run_directory, Path(plan.run_directory))
