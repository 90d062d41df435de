"""One VM: a QEMU process, its monitor, its console and its guest agent.

This is the one face that the host agent talks to.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from undercroft.hypervisor.board import machine_version
from undercroft.hypervisor.commandline import command_line, needs_tsc
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.firmware import find_firmware
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.hypervisor.helper import Batch, GuestHelper
from undercroft.hypervisor.holding import abandon, start_error, take_hold
from undercroft.hypervisor.hosttsc import measure_tsc_khz
from undercroft.hypervisor.launch import (
    Launch,
    launch,
    write_plan,
)
from undercroft.hypervisor.livesave import save_live
from undercroft.hypervisor.machine_disks import MachineDisks
from undercroft.hypervisor.measure import measure
from undercroft.hypervisor.migration import read_from, stop_saving
from undercroft.hypervisor.output import OutputLog
from undercroft.hypervisor.plan import MachinePlan, PlanDisk, PlanPort, unit_of
from undercroft.hypervisor.publish import publish
from undercroft.hypervisor.screen import open_vnc, take_screenshot
from undercroft.hypervisor.session import END_TIMEOUT
from undercroft.hypervisor.state import (
    STOPPED,
    EventHandler,
    ExitReport,
    MachineEvent,
    MachineStats,
    RunState,
    needs,
)
from undercroft.hypervisor.state_file import discard_state, suspended_plan
from undercroft.hypervisor.suspend import make_savable, save_devices, save_state
from undercroft.model.errors import (
    GuestAgentError,
    QmpError,
    TimeLimitError,
    UndercroftError,
)
from undercroft.model.vm import Display, Firmware, Instance
from undercroft.model.volume import IOLimits

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

_ALIVE = (
    RunState.RUNNING,
    RunState.PAUSED,
    RunState.IO_ERROR,
    RunState.SHUTDOWN,
    RunState.PANICKED,
    RunState.INCOMING,
    RunState.SUSPENDING,
)


class QemuMachine(MachineDisks):
    """A running VM. Made by `start` or `adopt` only; see `MachineSession` for its attributes, and
    `MachineDisks` for what can be done with its disks."""

    @classmethod
    async def start(
        cls,
        plan: MachinePlan,
        emulator: Emulator,
        *,
        on_event: EventHandler | None = None,
        hold: bool = False,
    ) -> QemuMachine:
        """Starts QEMU; returns once its monitor answers (the guest runs by then), or once the
        state in ``plan.incoming`` is loaded and the guest goes on. ``hold``: the state is kept and
        the guest stays paused.

        Raises:
            QemuStartError: with QEMU's last words; nothing is left behind.
            InvalidError, UnsupportedError: no such machine can be.
        """
        version = machine_version(plan, emulator.version)
        plan = msgspec.structs.replace(plan, machine_version=version)
        firmware = None
        if plan.firmware is Firmware.UEFI:
            firmware = find_firmware(plan.arch, plan.machine, secure_boot=plan.secure_boot)
        tsc = await asyncio.to_thread(measure_tsc_khz) if needs_tsc(plan) else None
        line = command_line(plan, emulator, firmware, tsc_khz=tsc)
        launching = asyncio.ensure_future(asyncio.to_thread(launch, plan, line, firmware))
        try:
            launched = await asyncio.shield(launching)
        except asyncio.CancelledError:
            # The thread cannot be stopped: wait for what it starts, and end that.
            with contextlib.suppress(UndercroftError):
                await abandon(await launching, plan)
            raise
        output = OutputLog.of(launched.output, plan)
        machine = cls(plan, launched.process, output, on_event, launched.helpers)
        try:
            await machine._come_up(launched, emulator, hold)
        except BaseException as error:
            report = await asyncio.shield(machine._give_up())
            if isinstance(error, asyncio.CancelledError):
                raise
            raise start_error(plan, error, report) from error
        return machine

    async def _come_up(self, launched: Launch, emulator: Emulator, hold: bool) -> None:
        self.instance = self._make_instance(launched.process, emulator.version_text)
        self.console = self._open_console(launched.connections["serial"], fresh=True)
        self._watcher = asyncio.create_task(self._watch())
        await self._connect(launched.connections["qmp"], _START_TIMEOUT)
        if (helper := launched.connections.get("helper")) is not None:
            self.helper = GuestHelper(f"vm {self.name}", helper)
        for index, disk in enumerate(self.plan.disks):
            if disk.limits != IOLimits():
                await self.limit(unit_of(disk, index), disk.limits)
        if self.plan.incoming is not None:
            state = Path(self.plan.incoming)
            await read_from(self._monitor, state, apart=self.forked)
            if not hold:
                going = asyncio.ensure_future(self._let_go(state))
                try:
                    await asyncio.shield(going)
                except asyncio.CancelledError:
                    await going  # too late: the state is only in this QEMU now
                self.close_helper()
        await self._learn_state()

    async def _let_go(self, state: Path) -> None:
        """Lets a loaded guest go on. It will change its disks, so its state must be gone for good
        before: to load it once more, after whatever crash, would destroy what is on them."""
        await asyncio.to_thread(discard_state, state)
        await self._monitor.execute("cont")

    async def go(self, batch: Batch | None = None) -> None:
        """Lets a fork go on that was held, and its helper do ``batch`` before all else.

        Raises:
            QmpError, TimeLimitError: QEMU ended.
        """
        if self.helper is not None and batch is not None:
            with contextlib.suppress(GuestAgentError):  # who waits for the answer will see
                await self.helper.send(batch)
        await self._monitor.execute("cont")

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
            QmpError, TimeLimitError: it runs, but cannot be taken over (now): it is stuck, or
                somebody else talks to it.
        """
        taken = await asyncio.to_thread(take_hold, instance, run_directory)
        if taken is None:
            return None
        plan, process, connection, serial, descriptor = taken
        plan = msgspec.structs.replace(
            plan, directory=str(directory), run_directory=str(run_directory)
        )
        machine = cls(plan, process, OutputLog.of(descriptor, plan), on_event)
        try:
            machine.instance = instance or machine._make_instance(process, "")
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

    @property
    def forked(self) -> bool:
        """Whether it went on from what others go on from, too."""
        return self.plan.memory_file is not None and not self.plan.memory_shared

    # What can be done

    def rename(self, name: str) -> None:
        """Calls it by another name from now on, as one that begins only now. QEMU's own title, as
        other processes see it, stays."""
        self.plan = msgspec.structs.replace(self.plan, name=name)
        self.instance = msgspec.structs.replace(self.instance, started=time.time())
        self._monitor.name = label = f"vm {name}"
        for channel in (self.helper, self.agent.channel if self.agent is not None else None):
            if channel is not None:
                channel.name = label

    async def publish(self, ports: tuple[PlanPort, ...]) -> None:
        """Forwards the ports of the host that ``ports`` have, in place of those of before.

        Raises:
            QmpError, TimeLimitError: one cannot be had.
        """
        await publish(self._monitor, self.plan.ports, ports)
        self.plan = msgspec.structs.replace(self.plan, ports=ports)
        await asyncio.to_thread(write_plan, self.plan)

    @needs(RunState.RUNNING)
    async def pause(self) -> None:
        """Stops the guest's processors."""
        await self._monitor.execute("stop")
        self._set_state(RunState.PAUSED)

    @needs(*STOPPED)
    async def resume(self) -> None:
        """Lets them go on (also after an I/O error, which comes again if nothing changed), and
        gives up a state that is being written and that nobody follows any more."""
        await stop_saving(self._monitor)
        await self._monitor.execute("cont")
        if self.run_state in STOPPED:  # QEMU does not say so of one that was going already
            await self._learn_state()

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

    @needs(RunState.RUNNING, *STOPPED)
    async def reset(self) -> None:
        """Presses reset."""
        await self._monitor.execute("system_reset")
        if self.run_state in STOPPED:
            await self._monitor.execute("cont")

    async def quit(self, timeout: float = END_TIMEOUT) -> ExitReport:
        """Ends QEMU at once, its disks flushed; kills it if it does not end in time."""
        self._asked = self._asked or "quit"
        await self._end(timeout)
        return await self.wait_exit()

    async def kill(self) -> ExitReport:
        """SIGKILL, and waits."""
        self._asked = self._asked or "killed"
        self._process.signal(signal.SIGKILL)
        return await self.wait_exit()

    @needs(RunState.RUNNING, *STOPPED)
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

    @needs(*STOPPED)
    async def save_memory(
        self, path: Path, progress: Callable[[float], None] | None = None
    ) -> None:
        """Writes the state of a paused guest, all but its disks, to ``path``, with the plan beside
        it (`suspended_plan`); it stays paused.

        Raises:
            NoSpaceError, QmpError, TimeLimitError: it did not work; there is no file.
        """
        before = self.run_state
        self._set_state(RunState.SUSPENDING)
        try:
            await save_state(self._monitor, self.plan, path, progress)
        finally:
            if self.run_state is RunState.SUSPENDING:
                self._set_state(before)

    @needs(*STOPPED)
    async def make_savable(self) -> None:
        """Before `save_memory`, where the guest must not go on for a moment later than this: as
        when its disks branch off in between.

        Raises:
            QmpError, TimeLimitError: it did not work.
        """
        await make_savable(self._monitor)

    @needs(RunState.RUNNING)
    async def save_live(
        self,
        path: Path,
        disks: tuple[PlanDisk, ...],
        progress: Callable[[float], None] | None = None,
    ) -> float:
        """Writes the state of a guest that goes on meanwhile, as `save_memory` does, and has its
        disks branch off (`branch`) at the moment that the state is of. For how many seconds it
        stood still.

        Raises:
            NoSpaceError, QmpError, TimeLimitError, OSError: it did not work; there is no file
                (whether the disks have branched off, `branched` tells).
        """
        plan = msgspec.structs.replace(self.plan, disks=disks)
        self._brief = True
        try:
            return await save_live(self._monitor, plan, path, disks, self._going, progress)
        finally:
            self._brief = False
            try:
                if await self.branched(disks):
                    await self._became(disks=disks)
                await self._learn_state()
            except (QmpError, TimeLimitError):
                if self._monitor.connected and self._going():
                    self._set_state(RunState.PAUSED)  # it may well stand still: until it is resumed

    def _going(self) -> bool:
        return self.run_state is RunState.RUNNING

    @needs(RunState.RUNNING, *STOPPED)
    async def stop_saving(self) -> None:
        """Has QEMU give up what a `save_memory` or `save_live` began that nobody follows any more.

        Raises:
            QmpError, TimeLimitError: it does not.
        """
        await stop_saving(self._monitor)

    @needs(RunState.PAUSED)
    async def save_devices(self, path: Path) -> None:
        """Writes the state of a guest that was loaded and held, all but its disks and its memory,
        which ``plan.memory_file`` has. It must not run after that.

        Raises:
            QmpError, TimeLimitError, OSError: it did not work; there is no file.
        """
        await save_devices(self._monitor, self.plan, path)

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
