"""Guests whose disks have no room on the host: they are paused, lose nothing, and go on.

QEMU itself pauses a guest at the very write that finds no room, on all buses but NVMe: there the
write would fail in the guest. A guest that has an NVMe disk is therefore paused before, while there
is a little room left. How often we look follows from how fast the rest could be filled.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.outcome import change_status, write
from undercroft.hypervisor.machine import MachineEvent, QemuMachine, RunState
from undercroft.model.datastore import Datastore
from undercroft.model.errors import QmpError, TimeLimitError, WrongStateError
from undercroft.model.event import EventLevel
from undercroft.model.vm import VM, DiskBus, Power, VMState
from undercroft.operations.context import new_event

_FULL = "is full"
NEEDED = 256 << 20  # bytes, or a tenth of the disk, that must be free before a VM goes on
LOOK = 2.0  # seconds between two looks whether there is room again
_FILLING = 4 << 30  # bytes per second that are written at most
_LEAST, _MOST = 0.02, 2.0  # seconds between two looks whether there is room still


class Room:
    """Sees to the room for one VM's disks."""

    def __init__(self, environment: Environment, id: str) -> None:
        self._environment = environment
        self._id = id

    async def failed(self, machine: QemuMachine | None, event: MachineEvent) -> None:
        """QEMU has paused the guest because of an error of the host's disk."""
        full = bool(event.data.get("no_space"))
        await self._paused(await self._which(machine) if full else "the host's disk failed", full)
        if full and machine is not None:
            await self.go_on(machine, RunState.IO_ERROR)

    async def go_on(self, machine: QemuMachine, halted: RunState) -> None:
        """Lets a guest go on once there is room, unless somebody else did or does not want it."""
        while machine.run_state is halted:
            await asyncio.sleep(LOOK)
            if await self._full(machine) or machine.run_state is not halted:
                continue
            if not await self._wanted():
                return
            await machine.resume()
            await self._resumed()
            return

    async def guard(self, machine: QemuMachine) -> None:
        """Pauses a guest that has an NVMe disk before there is no room for what it writes."""
        if machine.run_state is RunState.PAUSED and await self._paused_by_us():
            await self.go_on(machine, RunState.PAUSED)
        while any(disk.bus is DiskBus.NVME for disk in machine.plan.disks):
            left = min(await asyncio.to_thread(_reserves, self._places(machine)), default=NEEDED)
            if left > 0 or machine.run_state is not RunState.RUNNING:
                await asyncio.sleep(min(_MOST, max(_LEAST, left / _FILLING)))
                continue
            try:
                await machine.pause()
            except WrongStateError:
                continue
            except (QmpError, TimeLimitError):
                await asyncio.sleep(_LEAST)
                continue
            await self._paused(await self._which(machine), True)
            await self.go_on(machine, RunState.PAUSED)

    def _places(self, machine: QemuMachine) -> set[Path]:
        """The directories in which what the guest writes is kept."""
        return {Path(disk.path).parent for disk in machine.plan.disks} or {self._environment.data}

    async def _full(self, machine: QemuMachine) -> set[Path]:
        """Those of them that have too little room for the guest to go on."""
        places = self._places(machine)
        return await asyncio.to_thread(lambda: {path for path in places if not _has_room(path)})

    async def _which(self, machine: QemuMachine | None) -> str:
        """What is full, in words."""
        full = await self._full(machine) if machine is not None else set()
        names = [
            item.record.label
            for item in (await self._environment.store.list(Datastore)).items
            if Path(item.record.spec.path) in full
        ]
        return f"{' and '.join(sorted(names))} {_FULL}" if names else f"the host's disk {_FULL}"

    async def _wanted(self) -> bool:
        found = await self._environment.store.get(VM, self._id)
        return found is not None and found.record.spec.power is Power.RUNNING

    async def _paused_by_us(self) -> bool:
        found = await self._environment.store.get(VM, self._id)
        return (
            found is not None
            and found.record.status.message is not None
            and (found.record.status.message.endswith(_FULL))
        )

    async def _paused(self, reason: str, full: bool) -> None:
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


def _room(directory: Path) -> tuple[int, int]:
    """The bytes free on the disk that a directory is on, and how many must be for a guest to go on.

    Raises:
        OSError: it cannot be reached.
    """
    usage = os.statvfs(directory)
    needed = min(NEEDED, usage.f_blocks * usage.f_frsize // 10)
    return usage.f_bavail * usage.f_frsize, needed


def _has_room(directory: Path) -> bool:
    try:
        free, needed = _room(directory)
    except OSError:
        return False
    return free >= needed


def _reserves(directories: set[Path]) -> list[int]:
    """How many bytes can be written in each before a guest has to wait. (One that cannot be reached
    is not full.)"""
    found = []
    for directory in directories:
        with contextlib.suppress(OSError):
            free, needed = _room(directory)
            found.append(free - needed // 2)
    return found
