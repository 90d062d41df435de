"""What an actor does when nobody asks: sees to a machine that ended, starts one that should run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from undercroft.host import exits
from undercroft.host.outcome import TaskRun, change_spec, change_status, unexpected, write
from undercroft.model.errors import UndercroftError
from undercroft.model.event import EventLevel
from undercroft.model.task import Task
from undercroft.model.vm import VM, ExitReason, Power, VMState
from undercroft.operations.context import new_event

if TYPE_CHECKING:
    from undercroft.host.actor import VMActor

log = structlog.get_logger(__name__)


async def reconcile(actor: VMActor, vm: VM) -> float:
    """Makes reality match the VM's record; returns after how many seconds to look again (0: when
    something changes)."""
    report = actor.ended_report()
    if report is not None:
        actor.release()
        return await _see_to_exit(actor, vm, exits.explain(report))
    if actor.machine is not None:
        return 0.0
    if vm.status.state.alive or vm.status.instance is not None:
        now = actor.environment.clock()
        saved = actor.environment.suspended_path(actor.id).exists()
        suspending = vm.status.state is VMState.SUSPENDING
        end = exits.suspended(now) if suspending and saved else exits.lost(now)
        return await _see_to_exit(actor, vm, end)
    if vm.status.state is VMState.CREATING:
        return 0.0
    if vm.spec.power is Power.RUNNING and vm.status.state is not VMState.FAILED:
        return await _start_again(actor, vm)
    return 0.0


async def _see_to_exit(actor: VMActor, vm: VM, end: exits.End) -> float:
    now = actor.environment.clock()
    again = exits.should_restart(vm, end.exit, now)
    state, power = VMState.STOPPED, Power.STOPPED
    saved = actor.environment.suspended_path(actor.id)
    if end.exit.reason is ExitReason.SUSPENDED and saved.exists():
        state, power = VMState.SUSPENDED, Power.SUSPENDED

    def change(record: VM) -> VM:
        restarts = exits.restarts_so_far(record, now)
        record = change_status(
            record,
            state=state,
            instance=None,
            last_exit=end.exit,
            addresses=(),
            agent=None,
            message=end.exit.message or None,
            restarts=restarts + 1 if again else restarts,
        )
        if not again and not record.tasks:
            record = change_spec(record, power=power)
        return record

    await write(
        actor.environment,
        VM,
        actor.id,
        change,
        lambda v: [new_event(now, end.event, v, end.describe(v), level=end.level)],
    )
    if again:
        actor.wake()
        return exits.backoff(exits.restarts_so_far(vm, now))
    return 0.0


async def _start_again(actor: VMActor, vm: VM) -> float:
    """Starts a VM that should run: after a failure, a restart of the host, or a crash of the
    daemon just before."""
    now = actor.environment.clock()
    last = vm.status.last_exit
    if last is not None and vm.status.restarts > 0:
        due = last.time + exits.backoff(vm.status.restarts - 1)
        if now < due:
            return due - now
    task = Task(
        meta=vm.meta, spec=exits.restart_spec(vm, actor.environment.host)
    )  # never written: it only carries the arguments
    try:
        outcome = await actor.verbs["vm.start"](actor, vm, TaskRun(actor.environment, task))
    except Exception as caught:
        error = caught if isinstance(caught, UndercroftError) else unexpected(caught, vm)
        fault = caught if error is not caught else None
        log.warning("starting again failed", vm=vm.meta.name, error=error.message, exc_info=fault)
        message = error.message
        again = vm.status.restarts < exits.MAX_RESTARTS

        def change(record: VM) -> VM:
            record = change_status(
                record,
                state=VMState.STOPPED,
                instance=None,
                message=message,
                restarts=record.status.restarts + 1,
                last_exit=exits.start_failure(now, message),
            )
            if not again and not record.tasks:
                record = change_spec(record, power=Power.STOPPED)
            return record

        await write(
            actor.environment,
            VM,
            actor.id,
            change,
            lambda v: [
                new_event(
                    now,
                    "vm.restart.failed",
                    v,
                    f"{v.label} could not be started again: {message}",
                    level=EventLevel.ERROR,
                )
            ],
        )
        return exits.backoff(vm.status.restarts) if again else 0.0
    await write(
        actor.environment,
        VM,
        actor.id,
        outcome.change,
        lambda v: [new_event(now, "vm.restarted", v, f"{v.label} was started again by itself")],
    )
    return 0.0
