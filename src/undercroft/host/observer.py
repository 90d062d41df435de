"""Keeps a VM's status true while it runs: guest agent, addresses, I/O errors of the host's disk."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import structlog

from undercroft.host.environment import Environment
from undercroft.host.individuality import individual, make_individual
from undercroft.host.outcome import change_status, write
from undercroft.hypervisor.machine import MachineEvent, QemuMachine, RunState
from undercroft.model.datastore import Datastore
from undercroft.model.errors import UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.vm import VM, Identity, Power, VMState
from undercroft.operations.context import new_event

log = structlog.get_logger(__name__)

FIRST_LOOKS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between looks while there is no address
STEADY_LOOK = 30.0
FORK_LOOK, FORK_LOOKS = 1.0, 30  # seconds, and how often at most others are waited for
ROOM_NEEDED = 256 << 20  # bytes, or a tenth, that must be free before a VM goes on
ROOM_LOOK = 5.0


class Observer:
    """Watches one machine at a time."""

    def __init__(self, environment: Environment, id: str) -> None:
        self._environment = environment
        self._id = id
        self._machine: QemuMachine | None = None
        self._agent_task: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._identified = False
        self._quiet = False

    def watch(self, machine: QemuMachine, *, quietly: bool = False) -> None:
        """Begins to watch; ``quietly``: the guest agent only from `look` on."""
        self.close()
        self._machine = machine
        self._quiet = quietly
        self._look_at_agent()
        if machine.run_state is RunState.IO_ERROR:  # it was so before we looked
            self.spawn(self._go_on_when_there_is_room(machine))

    def look(self, *, later: bool = False) -> None:
        """Begins to look at the guest agent; ``later``: not while guests are being forked, which
        have more need of the processors."""
        if later:
            self.spawn(self._look_later())
            return
        self._quiet = False
        self._look_at_agent()

    async def _look_later(self) -> None:
        await asyncio.sleep(FORK_LOOK)
        for _ in range(FORK_LOOKS):
            if not self._environment.forks:
                break
            await asyncio.sleep(FORK_LOOK)
        self.look()

    def close(self) -> None:
        """Stops watching."""
        for task in self._tasks:
            task.cancel()
        self._agent_task = None
        self._machine = None

    def on_event(self, event: MachineEvent) -> None:
        """Something happened in the machine."""
        if self._machine is None:
            return
        if event.kind == "agent":
            self._look_at_agent()
        elif event.kind == "io-error":
            self.spawn(self._io_error(event))
        elif event.kind == "state":
            self.spawn(self._state(event.state))

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Does something beside, for as long as the machine is watched."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        if isinstance(error, UndercroftError):
            log.debug("observation failed", vm=self._id, error=error.message)
        elif error is not None:
            log.warning("observation failed", vm=self._id, exc_info=error)

    def _look_at_agent(self) -> None:
        if self._quiet:
            return
        if self._agent_task is not None:
            self._agent_task.cancel()
        self._agent_task = self.spawn(self._follow_agent())

    async def _follow_agent(self) -> None:
        """Asks the agent for addresses: often at first, then twice a minute."""
        machine = self._machine
        if machine is None or machine.agent is None:
            return
        looks = 0
        while True:
            addresses: tuple[str, ...] = ()
            answers = await machine.agent.ping(timeout=5.0)
            if answers:
                await self._see_to_identity(machine)
                with contextlib.suppress(UndercroftError):
                    addresses = await machine.agent.addresses()
            elif looks == 0:
                await self._write(agent=False, addresses=())
                return  # the channel's own event starts this again once the agent is there
            await self._write(agent=answers, addresses=addresses)
            steady = bool(addresses) or looks >= len(FIRST_LOOKS)
            await asyncio.sleep(STEADY_LOOK if steady else FIRST_LOOKS[looks])
            looks += 1

    async def _see_to_identity(self, machine: QemuMachine) -> None:
        """A clone that has booted for the first time becomes somebody. (One that was forked is seen
        to by who forked it.)"""
        if self._identified or machine.forked:
            return
        found = await self._environment.store.get(VM, self._id)
        if found is None or not found.record.status.state.alive:
            return
        vm = found.record
        if vm.status.identity is Identity.PENDING:
            shares = await make_individual(machine, vm, forked=False)
            await write(self._environment, VM, self._id, lambda v: individual(v, shares))
        self._identified = True

    async def _write(self, **values: object) -> None:
        def change(vm: VM) -> VM:
            return change_status(vm, **values) if vm.status.state.alive else vm

        await write(self._environment, VM, self._id, change)

    async def _state(self, state: RunState) -> None:
        """QEMU stopped or went on by itself (not through an operation)."""
        if state is not RunState.IO_ERROR:
            return

        def change(vm: VM) -> VM:
            if vm.status.state is not VMState.RUNNING:
                return vm
            return change_status(vm, state=VMState.PAUSED, message="paused: disk error of the host")

        await write(self._environment, VM, self._id, change)

    async def _io_error(self, event: MachineEvent) -> None:
        machine = self._machine
        full = bool(event.data.get("no_space"))
        reason = await self._which_is_full() if full else "the host's disk failed"
        now = self._environment.clock()

        def change(vm: VM) -> VM:
            if not vm.status.state.alive:
                return vm
            return change_status(vm, state=VMState.PAUSED, message=f"paused: {reason}")

        await write(
            self._environment,
            VM,
            self._id,
            change,
            lambda vm: [
                new_event(
                    now,
                    "vm.io-error",
                    vm,
                    f"{vm.label} was paused, nothing is lost: {reason}",
                    level=EventLevel.ERROR,
                    data={"no_space": full},
                )
            ],
        )
        if full and machine is not None:
            await self._go_on_when_there_is_room(machine)

    async def _go_on_when_there_is_room(self, machine: QemuMachine) -> None:
        while machine.run_state is RunState.IO_ERROR:
            await asyncio.sleep(ROOM_LOOK)
            if not all(map(_has_room, self._places(machine))):
                continue
            found = await self._environment.store.get(VM, self._id)
            if found is None or found.record.spec.power is not Power.RUNNING:
                return
            await machine.resume()
            await self._resumed()
            return

    def _places(self, machine: QemuMachine) -> set[Path]:
        """The directories in which what the guest writes is kept."""
        return {Path(disk.path).parent for disk in machine.plan.disks} or {self._environment.data}

    async def _which_is_full(self) -> str:
        full = set()
        if self._machine is not None:
            full = {str(path) for path in self._places(self._machine) if not _has_room(path)}
        names = [
            item.record.label
            for item in (await self._environment.store.list(Datastore)).items
            if item.record.spec.path in full
        ]
        return f"{' and '.join(sorted(names))} is full" if names else "the host's disk is full"

    async def _resumed(self) -> None:
        now = self._environment.clock()
        await write(
            self._environment,
            VM,
            self._id,
            lambda vm: (
                change_status(vm, state=VMState.RUNNING, message=None)
                if vm.status.state is VMState.PAUSED
                else vm
            ),
            lambda vm: [
                new_event(now, "vm.resumed", vm, f"{vm.label} goes on: there is room again")
            ],
        )


def _has_room(directory: Path) -> bool:
    """Whether a guest can go on that has a disk there."""
    try:
        usage = os.statvfs(directory)
    except OSError:
        return False
    needed = min(ROOM_NEEDED, usage.f_blocks * usage.f_frsize // 10)
    return usage.f_bavail * usage.f_frsize >= needed
