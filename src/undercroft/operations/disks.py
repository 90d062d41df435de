"""Volumes as the disks of VMs: attaching, detaching, growing, limiting, while they run or not."""

from __future__ import annotations

import msgspec

from undercroft.model.checks import check_vm_spec
from undercroft.model.errors import (
    InUseError,
    InvalidError,
    NotFoundError,
    StaleError,
    WrongStateError,
)
from undercroft.model.requests import VolumeAttach, VolumeChange, VolumeResize
from undercroft.model.task import Task, TaskState
from undercroft.model.units import format_size
from undercroft.model.vm import MAX_DISKS, VM, Disk, VMState, disk_units
from undercroft.model.volume import Volume, check_limits, check_volume_size
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_queue,
    find,
    new_event,
    new_task,
    pending,
)
from undercroft.operations.vm_power import check_present
from undercroft.operations.volume_use import check_idle, users_of
from undercroft.store.interface import Check, Put, Transaction, Versioned


class DiskOperations:
    """attach, detach, resize, set."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def attach(self, caller: Caller, ref: str, request: VolumeAttach) -> Task:
        """Gives a volume to a VM, running or not.

        Raises:
            InUseError: a VM has it already. BusyError: something is being done with it.
            WrongStateError: the VM is suspended, being made or removed.
            InvalidError, UnsupportedError: the VM cannot have it so.
        """
        caller.require("volume.change")
        caller.require("vm.change")
        context = self._context
        for _ in range(ATTEMPTS):
            found = await find(context.store, Volume, ref)
            volume = found.record
            owner = await find(context.store, VM, request.vm)
            vm = owner.record
            how = {"bus": request.bus.value, "read_only": request.read_only}
            if volume.spec.attached == vm.meta.id:
                same = await pending(context.store, vm, ("volume.attach",))
                if same is not None and same.spec.arguments.get("volume") == volume.meta.id:
                    return same
            check_idle(volume)
            await check_free(context, volume)
            check_changeable(vm)
            taken = {*disk_units(vm.spec.disks), *await _units_promised(context, vm)}
            disk = Disk(
                volume=volume.meta.id,
                bus=request.bus,
                read_only=request.read_only,
                unit=free_unit(taken),
            )
            check_vm_spec(msgspec.structs.replace(vm.spec, disks=(*_fixed(vm), disk)))
            task = new_task(
                context,
                "volume.attach",
                vm,
                caller.name,
                volume=volume.meta.id,
                name=volume.meta.name,
                unit=disk.unit,
                **how,
            )
            wanted = msgspec.structs.replace(volume.spec, attached=vm.meta.id)
            try:
                await self._write(owner, task, found, msgspec.structs.replace(volume, spec=wanted))
            except StaleError:
                continue
            return task
        raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")

    async def detach(self, caller: Caller, ref: str) -> Task:
        """Takes a volume away from its VM, running or not. From then on it stands for itself.

        Raises:
            WrongStateError: no VM has it; or the VM is suspended, being made or removed.
        """
        caller.require("volume.change")
        caller.require("vm.change")
        for _ in range(ATTEMPTS):
            found = await find(self._context.store, Volume, ref)
            volume = found.record
            owner = await self._user(volume)
            if owner is None:
                raise WrongStateError(f"{volume.label} is not attached", object=volume.label)
            vm = owner.record
            same = await pending(self._context.store, vm, ("volume.detach",))
            if same is not None and same.spec.arguments.get("volume") == volume.meta.id:
                return same
            check_changeable(vm)
            task = new_task(
                self._context,
                "volume.detach",
                vm,
                caller.name,
                volume=volume.meta.id,
                name=volume.meta.name,
            )
            try:
                await self._write(owner, task)
            except StaleError:
                continue
            return task
        raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")

    async def resize(self, caller: Caller, ref: str, request: VolumeResize) -> Task:
        """Makes a volume larger; a guest that has it sees that at once. Snapshots stay as they are.

        Raises:
            InvalidError: it would become smaller, or too large.
            WrongStateError: its VM is suspended, being made or removed.
        """
        caller.require("volume.change")
        if (request.size is None) == (request.by is None):
            raise InvalidError(
                "how large is it to be?", action="give either a size, or by how much"
            )
        for _ in range(ATTEMPTS):
            found = await find(self._context.store, Volume, ref)
            volume = found.record
            now = volume.spec.size
            size = check_volume_size(
                request.size if request.size is not None else now + _by(request)
            )
            if size == now:
                raise InvalidError(
                    f"{volume.label} has {format_size(now)} already",
                    object=volume.label,
                    action="choose a larger size",
                )
            if size < now:
                raise InvalidError(
                    f"{volume.label} has {format_size(now)} already, and is not made smaller",
                    object=volume.label,
                    action="choose a larger size; for less, copy what is on it to a new volume",
                )
            owner = await self._user(volume)
            try:
                if owner is None:
                    check_idle(volume)
                    task = new_task(self._context, "volume.resize", volume, caller.name, size=size)
                    wanted = msgspec.structs.replace(volume, tasks=(*volume.tasks, task.meta.id))
                    await self._context.store.transact(
                        Transaction(
                            checks=[Check(Volume, volume.meta.id, found.revision)],
                            puts=[Put(wanted), Put(task)],
                        )
                    )
                    return task
                check_changeable(owner.record)
                task = new_task(
                    self._context,
                    "volume.resize",
                    owner.record,
                    caller.name,
                    volume=volume.meta.id,
                    name=volume.meta.name,
                    size=size,
                )
                await self._write(owner, task)
            except StaleError:
                continue
            return task
        raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")

    async def set(self, caller: Caller, ref: str, request: VolumeChange) -> Task:
        """Changes what a guest may do with a volume per second, at once if it runs.

        Raises:
            InvalidError: the limits make no sense.
        """
        caller.require("volume.change")
        values = {k: v for k, v in msgspec.structs.asdict(request).items() if v is not None}
        for _ in range(ATTEMPTS):
            found = await find(self._context.store, Volume, ref)
            volume = found.record
            limits = check_limits(msgspec.structs.replace(volume.spec.limits, **values))
            wanted = msgspec.structs.replace(
                volume, spec=msgspec.structs.replace(volume.spec, limits=limits)
            )
            owner = await self._user(volume)
            try:
                if owner is not None and owner.record.status.state.alive:
                    check_queue(owner.record)
                    task = new_task(
                        self._context,
                        "volume.limit",
                        owner.record,
                        caller.name,
                        volume=volume.meta.id,
                        name=volume.meta.name,
                    )
                    await self._write(owner, task, found, wanted)
                    return task
                return await self._write_limits(caller, found, wanted)
            except StaleError:
                continue
        raise StaleError(f"others keep changing volume {ref}", object=f"volume {ref}")

    async def _write_limits(self, caller: Caller, found: Versioned[Volume], wanted: Volume) -> Task:
        """Limits of a volume that no running guest has: there is nothing more to do about them."""
        now = self._context.clock()
        task = new_task(self._context, "volume.limit", wanted, caller.name)
        status = msgspec.structs.replace(
            task.status, state=TaskState.SUCCEEDED, progress=1.0, started=now, finished=now
        )
        task = msgspec.structs.replace(task, status=status)
        event = new_event(
            now, "volume.limited", wanted, f"{wanted.label} has new limits", by=caller.name
        )
        await self._context.store.transact(
            Transaction(
                checks=[Check(Volume, wanted.meta.id, found.revision)],
                puts=[Put(wanted), Put(task), Put(event)],
            )
        )
        return task

    async def _user(self, volume: Volume) -> Versioned[VM] | None:
        """The VM that has a volume, or is about to have it."""
        if volume.spec.user is None:
            return None
        try:
            return await find(self._context.store, VM, volume.spec.user)
        except NotFoundError:
            return None

    async def _write(
        self,
        owner: Versioned[VM],
        task: Task,
        found: Versioned[Volume] | None = None,
        wanted: Volume | None = None,
    ) -> None:
        """Writes a task of a VM's, and what becomes of a volume with it."""
        vm = owner.record
        checks = [Check(VM, vm.meta.id, owner.revision)]
        puts = [Put(msgspec.structs.replace(vm, tasks=(*vm.tasks, task.meta.id))), Put(task)]
        if found is not None and wanted is not None:
            checks.append(Check(Volume, found.record.meta.id, found.revision))
            puts.append(Put(wanted))
        await self._context.store.transact(Transaction(checks=checks, puts=puts))


def check_changeable(vm: VM) -> None:
    """Does nothing if the disks of a VM can be changed now.

    Raises:
        WrongStateError: it is suspended, being made or removed. BusyError: too much waits.
    """
    check_present(vm)
    if vm.status.state in (VMState.CREATING, VMState.SUSPENDED, VMState.SUSPENDING):
        action = "wait until it is there"
        if vm.status.state is not VMState.CREATING:
            action = f"let it go on first: croft resume {vm.meta.name}"
        raise WrongStateError(
            f"{vm.label} is {vm.status.state}, so its disks stay as they are",
            object=vm.label,
            action=action,
            state=vm.status.state,
        )
    check_queue(vm)


async def check_free(context: Context, volume: Volume) -> None:
    """Does nothing if no VM has a volume. (That of a VM which is just giving it back is not free.)

    Raises:
        InUseError: one has it.
    """
    for user in await users_of(context, volume):
        if isinstance(user, VM):
            raise InUseError(
                f"{volume.label} is attached to {user.label}",
                object=volume.label,
                action=f"detach it first: croft volume detach {volume.meta.name}",
                users=[user.meta.id],
            )


def free_unit(taken: set[int]) -> int:
    """A place for one more disk. The first is for the disk that a VM is made with.

    Raises:
        InvalidError: there is none.
    """
    unit = next((n for n in range(1, MAX_DISKS) if n not in taken), None)
    if unit is None:
        raise InvalidError(f"a VM has at most {MAX_DISKS} disks", action="detach one first")
    return unit


async def _units_promised(context: Context, vm: VM) -> set[int]:
    """The places of disks that are still to be attached."""
    units = set()
    for id in vm.tasks:
        found = await context.store.get(Task, id)
        if found is not None and found.record.spec.verb == "volume.attach":
            units.add(int(found.record.spec.arguments["unit"]))
    return units


def _fixed(vm: VM) -> tuple[Disk, ...]:
    """The disks of a VM, each with its place."""
    units = disk_units(vm.spec.disks)
    return tuple(
        msgspec.structs.replace(disk, unit=unit)
        for disk, unit in zip(vm.spec.disks, units, strict=True)
    )


def _by(request: VolumeResize) -> int:
    if request.by is None or request.by <= 0:
        raise InvalidError("a volume can only become larger", action="give a positive size")
    return request.by
