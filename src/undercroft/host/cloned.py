"""How an actor makes its VM as a clone: as one that goes on from its source's memory, or boots."""

from __future__ import annotations

from functools import partial

import structlog

from undercroft.host import power
from undercroft.host.actor import Outcome, VMActor
from undercroft.host.cloning import fork, go_on, load, make_clone
from undercroft.host.identity import Steps, see_to_the_rest
from undercroft.host.individuality import individual, make_individual
from undercroft.host.layers import collect_layers, volume_status
from undercroft.host.observer import STEADY_LOOK
from undercroft.host.outcome import TaskRun, change_status, write
from undercroft.host.planning import plan_ports
from undercroft.host.templates import collect_templates, remove_template, wait_for
from undercroft.hypervisor.machine import QemuMachine, RunState
from undercroft.model.errors import QmpError, TimeLimitError, UndercroftError
from undercroft.model.requests import CloneMode
from undercroft.model.template import Template
from undercroft.model.vm import VM, Identity, Power, VMState
from undercroft.model.volume import Volume, VolumeState
from undercroft.store.interface import update

__all__ = ["can_boot_instead", "make"]

log = structlog.get_logger(__name__)

SOON = 1.0  # seconds
SEED_ROOM = 256 << 10  # bytes for the cloud-init seed of a VM that is not known yet


async def can_boot_instead(actor: VMActor, run: TaskRun) -> bool:
    """Whether a VM that could not go on from a template has been put back to where it can boot. The
    template goes: the next is made from this boot."""
    environment = actor.environment
    found = await environment.store.get(VM, actor.id)
    if not run.arguments.get("warm") or actor.machine is not None or found is None:
        return False
    vm = found.record
    if vm.status.state is not VMState.CREATING:
        return False
    for disk in vm.spec.disks:  # nobody has written to them
        await update(
            environment.store,
            Volume,
            disk.volume,
            lambda volume: volume_status(volume, head="", state=VolumeState.PENDING),
        )
    template = await environment.store.get(Template, str(run.arguments["template"]))
    if template is not None:
        await remove_template(environment, template.record)
    await collect_layers(environment)
    return True


async def make(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes a VM that is a clone, and lets it go on or starts it if asked to."""
    environment = actor.environment
    if run.arguments.get("hold"):
        return await _hold(actor, vm, run)
    source = str(run.arguments.get("source", ""))
    warm = "warm" in run.arguments
    how = "goes on from" if warm else "was cloned from"
    instant = run.arguments.get("mode") == CloneMode.INSTANT
    outcome = Outcome(
        lambda record: record,
        event="vm.started" if warm else "vm.cloned",
        message=f"{vm.label} {how} {source}",
    )
    macs = {str(old): str(new) for old, new in run.arguments.get("macs", {}).items()}
    steps = None
    if vm.status.state is VMState.CREATING:
        if actor.machine is not None and actor.machine.run_state is not RunState.RUNNING:
            ready = False
            if actor.held:
                ready, steps = await _release(actor, vm, run, macs, warm)
            if not ready:
                await actor.machine.kill()  # a daemon died before it had it go on: begun anew
                await actor.exited(None)
                actor.release()
        if actor.machine is None:
            await run.progress(None, "making the disks")
            template = await make_clone(actor, vm, run)
            if instant:
                forked, steps = await fork(actor, vm, template, macs, warm=warm)
                actor.take(forked, quietly=True)
        machine = actor.machine
        values = (
            {"state": VMState.STOPPED}
            if machine is None
            else {
                "state": VMState.RUNNING,
                "instance": machine.instance,
            }
        )
        made = await write(
            environment,
            VM,
            vm.meta.id,
            lambda record: change_status(record, identity=Identity.PENDING, **values),
        )
        vm = made or vm
    if instant and actor.machine is not None:
        run.committed = True
        shares = await make_individual(actor.machine, vm, forked=True, old_macs=macs, steps=steps)
        message = None
        try:
            await actor.machine.publish(plan_ports(vm))
        except (QmpError, TimeLimitError) as error:  # it goes on without
            message = error.message
        answers = await _answers(actor.machine, vm)
        addresses = steps.facts.addresses if steps is not None and answers else ()
        # All is known of it then: whatever a guest does first costs it much under emulation.
        actor.look(after=STEADY_LOOK if addresses else SOON)
        if steps is not None:
            actor.in_background(see_to_the_rest(actor.machine, steps.facts, environment.no_forks))
        outcome.change = lambda record: change_status(
            individual(record, shares), message=message, agent=answers, addresses=addresses
        )
        outcome.result["pid"] = actor.machine.instance.pid
        if shares:
            outcome.result["shares"] = list(shares)
    elif not instant and run.arguments.get("start") and vm.spec.power is Power.RUNNING:
        started = await power.start(actor, vm, run)
        outcome.change, outcome.result = started.change, started.result
    outcome.result["vm"] = vm.meta.id
    if warm:
        outcome.result["template"] = run.arguments["template"]
    if instant and "waits" not in run.arguments:
        environment.used(str(run.arguments["template"]))
    outcome.after = partial(collect_templates, environment)
    return outcome


async def _hold(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes a clone that is nobody's yet, and keeps it where it is about to go on."""
    if actor.machine is not None:
        await actor.machine.kill()
        await actor.exited(None)
        actor.release()
    template = await make_clone(actor, vm, run)
    machine = await load(actor, vm, template, room=SEED_ROOM)
    actor.take(machine, quietly=True)
    actor.held = True
    held = {"held": template.meta.id, "instance": machine.instance}
    return Outcome(lambda record: change_status(record, **held))


async def _release(
    actor: VMActor, vm: VM, run: TaskRun, macs: dict[str, str], warm: bool
) -> tuple[bool, Steps | None]:
    """Lets a machine that was held go on as this VM; whether it does."""
    actor.held = False
    try:
        template = await wait_for(actor.environment, str(run.arguments["template"]), None)
        return await go_on(actor, vm, template, macs, warm=warm)
    except (UndercroftError, OSError) as error:
        log.warning("what was held is of no use", vm=vm.meta.name, error=str(error))
        return False, None


async def _answers(machine: QemuMachine, vm: VM) -> bool | None:
    """Whether the agent of a clone answers, by its new name; None: it has none."""
    agent = machine.agent
    if agent is None or agent.channel.present is False:
        return None
    try:
        name = await agent.host_name()
    except UndercroftError:
        return False
    return name == (vm.spec.guest.hostname or vm.meta.name)
