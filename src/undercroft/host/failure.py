"""What a task of a VM leaves behind that failed or was cancelled: the record says what is, and
nothing happens later behind the user's back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import structlog

from undercroft.host.attachments import not_attached
from undercroft.host.importing import forget_upload
from undercroft.host.outcome import TaskRun, change_spec, change_status, finish, write
from undercroft.model.errors import UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.vm import VM, Power, VMState

if TYPE_CHECKING:
    from undercroft.host.actor import VMActor

_BESIDE_POWER = (
    "snapshot.create",
    "snapshot.remove",
    "template.create",
    "volume.clone",
    "volume.flatten",
    "volume.attach",
    "volume.detach",
    "volume.resize",
    "volume.limit",
    "checkpoint.create",
    "checkpoint.release",
)

log = structlog.get_logger(__name__)


async def settle_failure(
    actor: VMActor, vm: VM, run: TaskRun, error: UndercroftError | None = None
) -> None:
    """Writes down that a task did not come about: it failed, or without an ``error`` it was
    cancelled. What of a creation there is goes."""
    verb = run.task.spec.verb
    if error is not None:
        log.warning("task failed", task=run.id, verb=verb, vm=vm.meta.name, error=error.message)
    if verb == "vm.create":
        await _undo_creation(actor, run, error)
        return
    if verb == "volume.attach":
        await not_attached(actor.environment, vm, run)
    if (undo := actor.verbs.get(f"{verb}.undo")) is not None:
        try:
            await undo(actor, vm, run)
        except Exception as fault:  # housekeeping will see to it
            log.warning("undoing failed", task=run.id, vm=vm.meta.name, exc_info=fault)
    event = (f"{verb}.cancelled", f"{vm.label}: {verb} was cancelled", EventLevel.INFO)
    if error is not None:
        event = (f"{verb}.failed", f"{vm.label}: {error.message}", EventLevel.ERROR)
    await finish(
        actor.environment,
        VM,
        actor.id,
        run.id,
        error=error,
        cancelled=error is None,
        change=lambda v: _settled(actor, v, error, verb),
        event=event,
    )


async def _undo_creation(actor: VMActor, run: TaskRun, error: UndercroftError | None) -> None:
    """A VM that could not be created, or that is to be removed, leaves nothing behind; one that
    was created but did not start stays, switched off."""
    # Written before anything is undone, so that it stays decided whatever comes in between.
    vm = await write(actor.environment, VM, actor.id, _given_up)
    if vm is None:
        return
    why = "it was cancelled" if error is None else error.message
    level = EventLevel.INFO if error is None else EventLevel.ERROR
    if vm.status.state is not VMState.REMOVING:
        await finish(
            actor.environment,
            VM,
            actor.id,
            run.id,
            error=error,
            cancelled=error is None,
            change=lambda v: _settled(actor, v, error),
            event=("vm.start.failed", f"{vm.label} was created but not started: {why}", level),
        )
        await actor.verbs["vm.create.undo"](actor, vm, run)
        return
    removal = await actor.verbs["vm.remove"](actor, vm, run)
    await finish(
        actor.environment,
        VM,
        actor.id,
        run.id,
        error=error,
        cancelled=error is None,
        change=removal.change,
        extra=removal.extra,
        event=("vm.create.failed", f"{vm.label} was not created: {why}", level),
    )
    if removal.after is not None:
        await removal.after()
    await forget_upload(actor.environment, run)


def _given_up(vm: VM) -> VM:
    if vm.status.state is not VMState.CREATING:
        return vm
    return change_status(vm, state=VMState.REMOVING)


def _settled(actor: VMActor, vm: VM, error: UndercroftError | None, verb: str = "") -> VM:
    """The record after something did not come about: it says what is, and if nothing else is
    waiting also wants what is."""
    state = actor.present_state(vm)
    if verb in _BESIDE_POWER:  # whether it runs was not the question
        message = error.message if error else None
        if actor.machine is None:
            return change_status(vm, message=message)
        return change_status(vm, message=message, state=state)
    if verb == "vm.remove":  # it is not being removed any more
        vm = msgspec.structs.replace(vm, status=msgspec.structs.replace(vm.status, state=state))
    vm = change_status(vm, state=state, message=error.message if error else None)
    if actor.machine is not None:
        vm = change_status(vm, instance=actor.machine.instance)
    else:
        vm = change_status(vm, instance=None, addresses=(), agent=None)
    if vm.tasks:
        return vm
    power = {
        VMState.RUNNING: Power.RUNNING,
        VMState.PAUSED: Power.PAUSED,
        VMState.SUSPENDED: Power.SUSPENDED,
    }.get(state, Power.STOPPED)
    return change_spec(vm, power=power)
