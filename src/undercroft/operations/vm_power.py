"""Switching VMs: each operation writes the desired power state and a task, in one transaction."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from undercroft.model.checks import check_can_be_saved
from undercroft.model.errors import InvalidError, StaleError, WrongStateError
from undercroft.model.requests import StopRequest
from undercroft.model.task import Task
from undercroft.model.vm import VM, Power, VMState
from undercroft.operations.access import Caller
from undercroft.operations.context import (
    ATTEMPTS,
    Context,
    check_queue,
    check_unchanged,
    find,
    new_task,
    pending,
)
from undercroft.store.interface import Check, Put, Transaction

_STOPPED = (VMState.STOPPED, VMState.FAILED)
MAX_STOP_TIMEOUT = 86400.0


def _refuse(vm: VM, doing: str, action: str | None = None) -> WrongStateError:
    return WrongStateError(
        f"{vm.label} is {vm.status.state}, so it cannot be {doing}",
        object=vm.label,
        action=action,
        state=vm.status.state,
        power=vm.spec.power,
    )


def check_present(vm: VM) -> None:
    """Does nothing unless the VM is on its way out.

    Raises:
        WrongStateError: it is being removed.
    """
    if vm.status.state is VMState.REMOVING:
        raise _refuse(vm, "used", action="wait until it is gone")


def _rests(vm: VM) -> bool:
    """Whether it is off and nothing that waits will change that."""
    return vm.status.state in _STOPPED and not vm.tasks


def can_start(vm: VM) -> None:
    """Raises `WrongStateError` where starting makes no sense."""
    if vm.spec.power is Power.PAUSED:
        raise _refuse(vm, "started", action=f"let it go on: croft resume {vm.meta.name}")
    if vm.spec.power is Power.RUNNING and vm.status.state not in _STOPPED:
        raise _refuse(vm, "started")


def can_stop(vm: VM, force: bool) -> None:
    """Raises `WrongStateError` where stopping makes no sense."""
    if vm.status.state is VMState.SUSPENDED and not vm.tasks and not force:
        raise _refuse(
            vm,
            "stopped",
            action=f"start it first, or throw its saved state away: croft stop --force "
            f"{vm.meta.name}",
        )
    if vm.spec.power is Power.STOPPED and _rests(vm):
        raise _refuse(vm, "stopped")


def can_pause(vm: VM) -> None:
    """Raises `WrongStateError` where pausing makes no sense."""
    if vm.spec.power is not Power.RUNNING or _rests(vm):
        raise _refuse(vm, "paused")


def can_resume(vm: VM) -> None:
    """Raises `WrongStateError` where resuming makes no sense."""
    halted = vm.status.state is VMState.PAUSED  # by QEMU itself, after an error of the disk
    if vm.spec.power not in (Power.PAUSED, Power.SUSPENDED) and not halted:
        raise _refuse(vm, "resumed")


def can_suspend(vm: VM) -> None:
    """Raises `WrongStateError` where suspending makes no sense, `UnsupportedError` where it cannot
    be done."""
    if vm.spec.power not in (Power.RUNNING, Power.PAUSED) or _rests(vm):
        raise _refuse(vm, "suspended")
    check_can_be_saved(vm, "suspend")


def can_restart(vm: VM) -> None:
    """Raises `WrongStateError` where restarting or resetting makes no sense."""
    if vm.spec.power is not Power.RUNNING or _rests(vm):
        raise _refuse(vm, "restarted", action=f"start it: croft start {vm.meta.name}")


async def switch(
    context: Context,
    caller: Caller,
    ref: str,
    verb: str,
    power: Power,
    allowed: Callable[[VM], None],
    *,
    overtakes: bool = False,
    if_match: int | None = None,
    **arguments: object,
) -> Task:
    """Writes the desired power state and the task that brings it about.

    ``overtakes``: the tasks before it are asked to cancel rather than waited for, except for the
    one that makes the VM. A request that is already waiting or running is not made twice: its task
    is returned.

    Raises:
        NotFoundError, WrongStateError, BusyError, ForbiddenError, StaleError.
    """
    caller.require("vm.power")
    for _ in range(ATTEMPTS):
        found = await find(context.store, VM, ref)
        vm = found.record
        check_unchanged(found, if_match)
        check_present(vm)
        same = await pending(context.store, vm, (verb,))
        if same is not None and same.spec.arguments == arguments:
            return same
        allowed(vm)
        check_queue(vm)
        task = new_task(context, verb, vm, caller.name, **arguments)
        wanted = msgspec.structs.replace(
            vm,
            spec=msgspec.structs.replace(vm.spec, power=power),
            tasks=(*vm.tasks, task.meta.id),
        )
        checks = [Check(VM, vm.meta.id, found.revision)]
        puts = [Put(wanted), Put(task)]
        if overtakes:
            await ask_to_cancel(context, vm, checks, puts, spare=("vm.create",))
        try:
            await context.store.transact(Transaction(checks=checks, puts=puts))
        except StaleError:
            continue
        return task
    raise StaleError(f"others keep changing vm {ref}", object=f"vm {ref}", action="try again")


async def ask_to_cancel(
    context: Context,
    vm: VM,
    checks: list[Check],
    puts: list[Put],
    spare: tuple[str, ...] = (),
) -> None:
    """Adds to a transaction that the VM's unfinished tasks, except for these verbs, are to be
    cancelled."""
    for id in vm.tasks:
        earlier = await context.store.get(Task, id)
        if earlier is None or earlier.record.status.state.final or earlier.record.spec.cancel:
            continue
        if earlier.record.spec.verb in spare:
            continue
        checks.append(Check(Task, id, earlier.revision))
        puts.append(
            Put(
                msgspec.structs.replace(
                    earlier.record,
                    spec=msgspec.structs.replace(earlier.record.spec, cancel=True),
                )
            )
        )


def _check_timeout(request: StopRequest) -> None:
    if request.timeout is not None and not 0 <= request.timeout <= MAX_STOP_TIMEOUT:
        raise InvalidError("the time limit must lie between 0 and 86400 seconds")


class PowerOperations:
    """start, stop, restart, reset, pause, resume, suspend."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def start(self, caller: Caller, ref: str) -> Task:
        """Switches the VM on, or lets a suspended one go on from its saved state."""
        return await switch(self._context, caller, ref, "vm.start", Power.RUNNING, can_start)

    async def stop(self, caller: Caller, ref: str, request: StopRequest) -> Task:
        """Asks the guest to shut down and switches the VM off if it does not within the time; with
        ``force`` at once."""
        _check_timeout(request)
        return await switch(
            self._context,
            caller,
            ref,
            "vm.stop",
            Power.STOPPED,
            lambda vm: can_stop(vm, request.force),
            overtakes=request.force,
            force=request.force,
            timeout=request.timeout,
        )

    async def restart(self, caller: Caller, ref: str, request: StopRequest) -> Task:
        """Stops the VM and starts it with its present spec."""
        _check_timeout(request)
        return await switch(
            self._context,
            caller,
            ref,
            "vm.restart",
            Power.RUNNING,
            can_restart,
            overtakes=request.force,
            force=request.force,
            timeout=request.timeout,
        )

    async def reset(self, caller: Caller, ref: str) -> Task:
        """Presses the reset button: the guest gets no chance to prepare."""
        return await switch(self._context, caller, ref, "vm.reset", Power.RUNNING, can_restart)

    async def pause(self, caller: Caller, ref: str) -> Task:
        """Halts the VM's processors; its memory stays."""
        return await switch(self._context, caller, ref, "vm.pause", Power.PAUSED, can_pause)

    async def resume(self, caller: Caller, ref: str) -> Task:
        """Lets a paused or suspended VM go on."""
        return await switch(self._context, caller, ref, "vm.resume", Power.RUNNING, can_resume)

    async def suspend(self, caller: Caller, ref: str) -> Task:
        """Saves the VM's memory and devices to disk and ends its process."""
        return await switch(self._context, caller, ref, "vm.suspend", Power.SUSPENDED, can_suspend)
