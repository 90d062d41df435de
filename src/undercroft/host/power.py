"""How an actor switches its VM: start, stop, restart, reset, pause, resume, suspend."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import msgspec

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.exits import explain
from undercroft.host.outcome import TaskRun, change_spec, change_status, write
from undercroft.host.planning import (
    generation_id,
    make_plan,
    make_seed,
    plan_cdroms,
    plan_disks,
    plan_ports,
)
from undercroft.hypervisor.machine import ExitReport, QemuMachine, RunState, suspended_plan
from undercroft.hypervisor.plan import PlanPort
from undercroft.hypervisor.state_file import discard_state
from undercroft.model.checks import check_can_be_saved
from undercroft.model.errors import (
    GuestAgentError,
    QmpError,
    TimeLimitError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.vm import VM, Exit, ExitReason, Power, VMState
from undercroft.storage.threads import in_thread

AGENT_TIMEOUT = 3.0  # seconds for the agent to take a shutdown request
AGENT_PING = 0.5
AGENT_PATIENCE = 5.0  # seconds after which an agent that took the request is not relied upon
ASK_INTERVAL = 3.0


async def start(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Starts the VM, or lets a suspended one go on from its saved state."""
    environment = actor.environment
    saved = environment.suspended_path(vm.meta.id)
    resumed = False
    if actor.machine is not None and saved.exists():
        # A daemon died while this QEMU loaded the state: it has never run, and is begun anew.
        await actor.machine.kill()
        await actor.exited(None)
        actor.release()
    machine = actor.machine
    if machine is None:
        resumed = saved.exists()
        await asyncio.gather(  # one write of the store's for both
            run.progress(None, "starting"), _tell(actor, VMState.STARTING)
        )
        async with environment.start_slots:
            machine = await (_from_saved(actor, vm, saved) if resumed else _fresh(actor, vm))
        actor.take(machine)
        run.committed = True
        if resumed:
            actor.in_background(_set_clock(machine))
    elif machine.run_state is RunState.PAUSED:
        await machine.resume()
    instance = machine.instance
    by_user = not run.task.meta.id.startswith("vm-")

    def change(record: VM) -> VM:
        return change_status(
            record,
            state=VMState.RUNNING,
            instance=instance,
            message=None,
            restarts=0 if by_user else record.status.restarts,
        )

    told = "was resumed" if resumed else "was started"
    return Outcome(
        change,
        event="vm.started",
        message=f"{vm.label} {told}",
        result={"pid": instance.pid, "accelerator": instance.accelerator},
    )


async def _fresh(actor: VMActor, vm: VM) -> QemuMachine:
    environment = actor.environment
    seed = await make_seed(environment, vm)
    plan = await make_plan(environment, vm, seed)
    emulator = await environment.emulator(vm.spec.arch)
    return await QemuMachine.start(plan, emulator, on_event=actor.on_event)


async def _from_saved(actor: VMActor, vm: VM, saved: Path) -> QemuMachine:
    environment = actor.environment
    plan = suspended_plan(saved)
    plan = msgspec.structs.replace(
        plan,
        incoming=str(saved),
        name=vm.meta.name,
        generation=vm.meta.generation,
        vmgenid=generation_id(vm) if plan.vmgenid is not None else None,
        ports=_forwarding(plan.ports, vm),
        disks=await plan_disks(environment, vm),
        cdroms=await plan_cdroms(vm),
    )
    emulator = await environment.emulator(vm.spec.arch)
    return await QemuMachine.start(plan, emulator, on_event=actor.on_event)


def _forwarding(ports: tuple[PlanPort, ...], vm: VM) -> tuple[PlanPort, ...]:
    """Network adapters that were saved, with what is forwarded to them now."""
    now = [port.forwards for port in plan_ports(vm)]
    return tuple(
        msgspec.structs.replace(port, forwards=now[index] if index < len(now) else ())
        for index, port in enumerate(ports)
    )


async def _tell(actor: VMActor, state: VMState) -> None:
    """Writes what the VM is about to do."""
    await write(actor.environment, VM, actor.id, lambda record: change_status(record, state=state))


async def _set_clock(machine: QemuMachine) -> None:
    """A guest that was suspended has missed time: its agent sets the clock."""
    if machine.agent is None:
        return
    with contextlib.suppress(UndercroftError):  # without an agent the guest's own means must do
        await machine.agent.set_time()


async def stop(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Asks the guest to shut down; switches off after the time limit, or at once with ``force``."""
    force = bool(run.arguments.get("force"))
    limit = run.arguments.get("timeout")
    saved = actor.environment.suspended_path(vm.meta.id)
    if actor.machine is None and saved.exists() and not force:
        raise WrongStateError(
            f"{vm.label} is suspended, so it cannot be stopped",
            object=vm.label,
            action=f"throw its saved state away: croft stop --force {vm.meta.name}",
            state=VMState.SUSPENDED,
        )
    end = await _end(actor, vm, run, force, vm.spec.stop_timeout if limit is None else float(limit))
    run.committed = True
    await in_thread(lambda _: discard_state(saved))

    def change(record: VM) -> VM:
        record = _ended(record, end)
        return record if record.tasks else change_spec(record, power=Power.STOPPED)

    how = "switched off" if end.reason is ExitReason.FORCED else "stopped"
    return Outcome(
        change,
        event="vm.stopped",
        message=f"{vm.label} was {how}",
        result={"reason": end.reason},
    )


async def _end(actor: VMActor, vm: VM, run: TaskRun, force: bool, limit: float) -> Exit:
    """Ends the VM's machine, gently if there is time; tells how it ended."""
    machine = actor.machine
    now = actor.environment.clock
    if machine is None:
        if actor.environment.suspended_path(vm.meta.id).exists():
            return Exit(
                reason=ExitReason.FORCED, time=now(), message="its saved state was thrown away"
            )
        return vm.status.last_exit or Exit(reason=ExitReason.STOPPED, time=now())
    if not force and limit > 0 and machine.run_state is not RunState.IO_ERROR:
        await asyncio.gather(
            run.progress(None, "waiting for the guest to shut down"),
            _tell(actor, VMState.STOPPING),
        )
        ended = await _ask(actor, machine, limit)
        if ended is not None:
            actor.release()
            return _complied(ended)
    run.committed = True
    report = await machine.quit()
    await actor.exited(None)
    actor.release()
    if report.hint == "guest-shutdown":  # at the last moment
        return _complied(report)
    return Exit(
        reason=ExitReason.FORCED,
        time=report.time,
        message="" if force else f"did not shut down within {limit:g} s",
    )


def _complied(report: ExitReport) -> Exit:
    """The end of a guest that was asked to shut down: what it did, or what came in between."""
    end = explain(report).exit
    if end.reason is ExitReason.GUEST_SHUTDOWN:
        end = msgspec.structs.replace(end, reason=ExitReason.STOPPED)
    return end


async def _ask(actor: VMActor, machine: QemuMachine, limit: float) -> ExitReport | None:
    """Asks again and again, the agent if it answers and else by the power button, as a guest that
    is still booting hears neither; how the machine ended, or None if it has not."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit
    if machine.run_state is RunState.PAUSED:
        with contextlib.suppress(WrongStateError, QmpError, TimeLimitError):
            await machine.resume()
    asked = False
    while (left := deadline - loop.time()) > 0:
        heard = await _ask_agent(machine, left)
        if asked or not heard:
            # It may be on its way down already, and its monitor with it.
            with contextlib.suppress(WrongStateError, QmpError, TimeLimitError):
                await machine.power_button()
        asked = True
        wait = AGENT_PATIENCE if heard else ASK_INTERVAL
        report = await actor.exited(min(max(deadline - loop.time(), 0.0), wait))
        if report is not None:
            return report
    return None


async def _ask_agent(machine: QemuMachine, limit: float) -> bool:
    agent = machine.agent
    if agent is None or not await agent.ping(timeout=min(AGENT_PING, limit)):
        return False
    try:
        await machine.agent_shutdown(timeout=min(AGENT_TIMEOUT, limit))
    except (GuestAgentError, TimeLimitError, WrongStateError):
        return False
    return True


def _ended(record: VM, end: Exit) -> VM:
    return change_status(
        record,
        state=VMState.STOPPED,
        instance=None,
        last_exit=end,
        addresses=(),
        agent=None,
        message=end.message or None,
    )


async def restart(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Stops the VM and starts it with its present spec."""
    machine = actor.machine
    if machine is not None and machine.instance.started < run.task.meta.created:
        await stop(actor, vm, run)
        run.committed = False
        await write(
            actor.environment,
            VM,
            vm.meta.id,
            lambda record: change_status(record, state=VMState.STARTING, instance=None),
        )
    outcome = await start(actor, vm, run)
    outcome.message = f"{vm.label} was restarted"
    return outcome


async def reset(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Presses reset."""
    machine = _machine(actor, vm)
    await machine.reset()
    return Outcome(
        lambda record: change_status(record, state=actor.present_state(record)),
        event="vm.reset",
        message=f"{vm.label} was reset",
    )


async def pause(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Halts the processors."""
    machine = _machine(actor, vm)
    if machine.run_state is RunState.RUNNING:
        await machine.pause()
    return Outcome(
        lambda record: change_status(record, state=VMState.PAUSED),
        event="vm.paused",
        message=f"{vm.label} was paused",
    )


async def resume(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Lets a paused or suspended VM go on."""
    if actor.machine is None:
        if not actor.environment.suspended_path(vm.meta.id).exists():
            _machine(actor, vm)
        return await start(actor, vm, run)
    if actor.machine.run_state in (RunState.PAUSED, RunState.IO_ERROR):
        await actor.machine.resume()
    return Outcome(
        lambda record: change_status(record, state=VMState.RUNNING, message=None),
        event="vm.resumed",
        message=f"{vm.label} goes on",
    )


async def suspend(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Saves memory and devices to disk and ends the process."""
    saved = actor.environment.suspended_path(vm.meta.id)
    if actor.machine is not None:
        check_can_be_saved(vm, "suspend")
        await asyncio.gather(run.progress(0.0, "saving memory"), _tell(actor, VMState.SUSPENDING))
        if saved.exists():  # a daemon died just before this: the guest has not run since
            await actor.machine.quit()
        else:
            await actor.machine.suspend(saved)
        await actor.exited(None)
        actor.release()
    if not saved.exists():
        raise WrongStateError(f"{vm.label} is not running", object=vm.label)
    now = actor.environment.clock()

    def change(record: VM) -> VM:
        end = Exit(reason=ExitReason.SUSPENDED, time=now)
        return change_status(_ended(record, end), state=VMState.SUSPENDED)

    return Outcome(change, event="vm.suspended", message=f"{vm.label} was suspended to disk")


def _machine(actor: VMActor, vm: VM) -> QemuMachine:
    if actor.machine is None:
        raise WrongStateError(
            f"{vm.label} is not running",
            object=vm.label,
            action=f"start it: croft start {vm.meta.name}",
            state=vm.status.state,
            needed=VMState.RUNNING,
        )
    return actor.machine
