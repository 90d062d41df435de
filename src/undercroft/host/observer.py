"""Keeps a VM's status true while it runs: guest agent, addresses, I/O errors of the host's disk."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

import structlog

from undercroft.host.environment import Environment
from undercroft.host.individuality import individual, make_individual
from undercroft.host.outcome import change_status, write
from undercroft.host.room import Room
from undercroft.hypervisor.machine import MachineEvent, QemuMachine, RunState
from undercroft.model.errors import UndercroftError
from undercroft.model.vm import VM, Identity

log = structlog.get_logger(__name__)

FIRST_LOOKS = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between looks while there is no address
STEADY_LOOK = 30.0


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
        self._room = Room(environment, id)
        self._guard: asyncio.Task[None] | None = None

    def watch(self, machine: QemuMachine, *, quietly: bool = False) -> None:
        """Begins to watch; ``quietly``: the guest agent only from `look` on."""
        self.close()
        self._machine = machine
        self._quiet = quietly
        self._look_at_agent()
        if machine.run_state is RunState.IO_ERROR:  # it was so before we looked
            self.spawn(self._room.go_on(machine, RunState.IO_ERROR))
        self.guard()

    def guard(self) -> None:
        """Sees to it that there is room for what the machine's disks are written (`Room.guard`)."""
        if self._machine is not None and (self._guard is None or self._guard.done()):
            self._guard = self.spawn(self._room.guard(self._machine))

    def look(self, *, after: float = 0.0) -> None:
        """Begins to look at the guest agent, ``after`` so many seconds: then not while guests are
        being forked, which have more need of the processors."""
        if after:
            self.spawn(self._look_later(after))
            return
        self._quiet = False
        self._look_at_agent()

    async def _look_later(self, after: float) -> None:
        await asyncio.sleep(after)
        await self._environment.no_forks()
        self.look()

    def close(self) -> None:
        """Stops watching."""
        for task in self._tasks:
            task.cancel()
        self._agent_task = None
        self._guard = None
        self._machine = None

    def on_event(self, event: MachineEvent) -> None:
        """Something happened in the machine."""
        if self._machine is None:
            return
        if event.kind == "agent":
            self._look_at_agent()
        elif event.kind == "io-error":
            self.spawn(self._room.failed(self._machine, event))

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
                if looks == 0:
                    await self._thaw(machine)
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

    async def _thaw(self, machine: QemuMachine) -> None:
        """A guest whose file systems a daemon froze that died over that goes on."""
        with contextlib.suppress(UndercroftError):
            if machine.agent is not None and await machine.agent.thaw_forgotten():
                log.warning("thawed a guest that was left frozen", vm=machine.name)

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
