"""Forking a guest: any number of machines go on from one frozen moment and share its memory.

What is frozen is a file that holds the memory, and a state with all the rest (QEMU: migration with
``x-ignore-shared``). Each machine that is made from it maps the file privately: it has of its own
only the pages that it writes to, and starts in the time it takes to read a megabyte.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.machine import QemuMachine
from undercroft.hypervisor.plan import DiskFormat, MachinePlan, PlanDisk, PlanPort
from undercroft.hypervisor.state_file import full_message, is_full, link_state, suspended_plan
from undercroft.model.errors import NoSpaceError, QemuStartError, QmpError

__all__ = ["WORK", "fork_plan", "freeze", "frozen", "frozen_size", "without_forwards"]

_MEMORY, _DEVICES = "ram", "devices"
WORK = "work"
_SEED_SIZE = 1 << 20


def frozen(directory: Path) -> bool:
    """Whether `freeze` has finished in this directory."""
    return (directory / _DEVICES).exists()


def frozen_size(directory: Path) -> int:
    """Bytes on the host that a frozen guest takes; 0: there is none."""
    with contextlib.suppress(FileNotFoundError):
        return sum((directory / name).stat().st_blocks * 512 for name in (_MEMORY, _DEVICES))
    return 0


async def freeze(
    state: Path,
    directory: Path,
    emulator: Emulator,
    *,
    disks: Sequence[int],
    uid: int | None,
    durable: bool = True,
) -> None:
    """Makes from a saved state (`QemuMachine.save_memory`) what machines can be forked from, in
    ``directory``; a QEMU that never runs the guest puts its memory into a file.

    ``disks``: the sizes in bytes of the guest's disks. ``uid``: whom that QEMU runs as.
    ``durable``: it is to survive the host's crash.

    Raises:
        NoSpaceError: the disk is full.
        QemuStartError, QmpError, TimeLimitError, OSError: it did not work.
    """
    plan = suspended_plan(state)
    try:
        await _freeze(plan, state, directory, emulator, disks, uid)
    except (QemuStartError, QmpError) as error:
        # A QEMU that finds no room for memory in a file is killed by the kernel (SIGBUS).
        if not await asyncio.to_thread(is_full, directory):
            raise
        raise NoSpaceError(full_message(f"vm {plan.name}", directory)) from error
    await asyncio.to_thread(_finish, directory, durable)


async def _freeze(
    plan: MachinePlan,
    state: Path,
    directory: Path,
    emulator: Emulator,
    disks: Sequence[int],
    uid: int | None,
) -> None:
    work = directory / WORK
    await asyncio.to_thread(_prepare, directory, work, plan.memory, disks, uid)
    machine = await QemuMachine.start(
        msgspec.structs.replace(
            plan,
            directory=str(work / "vm"),
            run_directory=str(work / "run"),
            disks=tuple(_stand_in(disk, work, index) for index, disk in enumerate(plan.disks)),
            seed=str(work / "seed") if plan.seed is not None else None,
            ports=tuple(
                msgspec.structs.replace(port, apart=True) for port in without_forwards(plan.ports)
            ),
            incoming=str(state),
            memory_file=str(directory / _MEMORY),
            memory_shared=True,
            uid=uid,
            gid=uid,
        ),
        emulator,
        hold=True,
    )
    try:
        await machine.save_devices(work / _DEVICES)
    finally:
        await asyncio.shield(machine.kill())


def _stand_in(disk: PlanDisk, work: Path, index: int) -> PlanDisk:
    """An empty disk of the same size: the guest does not run, so nothing is read or written."""
    path = str(work / f"disk{index}")
    return msgspec.structs.replace(
        disk, path=path, format=DiskFormat.RAW, node="", backing=(), key=None
    )


def _prepare(
    directory: Path, work: Path, memory: int, disks: Sequence[int], uid: int | None
) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    sizes = {directory / _MEMORY: memory, work / "seed": _SEED_SIZE}
    sizes |= {work / f"disk{index}": size for index, size in enumerate(disks)}
    for path, size in sizes.items():
        with path.open("xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(size)
            if uid is not None:
                os.fchown(file.fileno(), uid, uid)


def _finish(directory: Path, durable: bool) -> None:
    """Makes the memory readable for whoever is handed it, and for nobody to write."""
    work = directory / WORK
    memory = directory / _MEMORY
    descriptor = os.open(memory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchown(descriptor, os.geteuid(), os.getegid())
        os.fchmod(descriptor, 0o444)
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    link_state(work / _DEVICES, directory / _DEVICES)
    shutil.rmtree(work, ignore_errors=True)


def fork_plan(directory: Path, /, **changes: Any) -> MachinePlan:
    """The plan of a machine that goes on from what is frozen in ``directory``. ``changes`` must say
    all that makes it another one: identity, directories, disks, seed, network, user.

    Raises:
        DataCorruptError: nothing usable is frozen there.
    """
    plan = suspended_plan(directory / _DEVICES)
    return msgspec.structs.replace(
        plan,
        memory_file=str(directory / _MEMORY),
        memory_shared=False,
        incoming=str(directory / _DEVICES),
        **changes,
    )


def without_forwards(ports: tuple[PlanPort, ...]) -> tuple[PlanPort, ...]:
    """Network adapters that nothing leads to from outside."""
    return tuple(msgspec.structs.replace(port, forwards=()) for port in ports)
