"""How an actor makes the files of a clone, and lets it go on from where its source was.

All of it can be repeated until the VM is there: what is half made is made anew. A guest that was
forked and ran before the daemon died is taken over; one that ended meanwhile begins anew, with
disks as they were when its source was frozen.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from undercroft.host.actor import VMActor
from undercroft.host.attachments import sized
from undercroft.host.environment import Environment
from undercroft.host.identity import GuestFacts, Steps, admit, plan_steps, read_facts
from undercroft.host.individuality import host_keys
from undercroft.host.layers import (
    collect_layers,
    get_layer,
    make_layer,
    new_layer,
    volume_status,
)
from undercroft.host.merging import flatten
from undercroft.host.outcome import TaskRun
from undercroft.host.planning import (
    generation_id,
    make_seed,
    plan_cdroms,
    plan_disks,
    plan_ports,
    remake_seed,
    vm_uuid,
)
from undercroft.host.snapshot_files import copy_besides
from undercroft.host.templates import wait_for
from undercroft.hypervisor.fork import fork_plan, without_forwards
from undercroft.hypervisor.machine import QemuMachine, RunState
from undercroft.model.errors import DataError
from undercroft.model.requests import CloneMode
from undercroft.model.template import Template
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeState
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Check, Put, Transaction, update


async def make_clone(actor: VMActor, vm: VM, run: TaskRun) -> Template:
    """Makes the volumes of a clone from what the task's template holds.

    Raises:
        UndercroftError: it did not work, and can be tried again.
    """
    environment = actor.environment
    waits = run.arguments.get("waits")
    template = await wait_for(
        environment, str(run.arguments["template"]), str(waits) if waits else None
    )
    source = environment.template_directory(template.meta.id)
    await in_thread(lambda _: copy_besides(source, environment.vm_directory(vm.meta.id)))
    for index, disk in enumerate(vm.spec.disks):
        below = template.status.disks[index].layer
        await _begin_on(environment, disk.volume, below, template, run.arguments.get("encrypted"))
    if run.arguments.get("mode") == CloneMode.FULL:
        await flatten(actor, vm, run)
    for disk in vm.spec.disks:
        await update(
            environment.store,
            Volume,
            disk.volume,
            lambda volume: volume_status(volume, state=VolumeState.READY),
        )
    return template


async def _begin_on(
    environment: Environment, id: str, below: str, template: Template, encrypted: bool | None
) -> None:
    """Gives a volume a first layer, empty, that lies on a frozen one; ``encrypted`` None: if that
    is."""
    found = await environment.store.get(Volume, id)
    held = await environment.store.get(Template, template.meta.id)
    if found is None or held is None:
        gone = f"volume {id}" if found is None else template.label
        raise DataError(f"{gone} is gone", object=gone)
    volume = found.record
    parent = await get_layer(environment, below)
    size = max(volume.spec.size, parent.spec.size)
    volume = sized(volume, size)  # its source may have grown since it was asked for
    # If it was begun before, by a daemon that died over that, it begins anew: what the layer has,
    # and what it lies on by now, is not what it began with.
    layer = new_layer(
        environment,
        size,
        parent=parent,
        datastore=volume.spec.datastore,
        encrypted=volume.spec.encrypted or encrypted,
    )
    spec = msgspec.structs.replace(volume.spec, encrypted=layer.spec.encrypted)
    volume = msgspec.structs.replace(volume, spec=spec)
    await environment.store.transact(
        Transaction(
            checks=[
                Check(Volume, id, found.revision),
                Check(Template, template.meta.id, held.revision),
            ],
            puts=[Put(layer), Put(volume_status(volume, head=layer.meta.id))],
        )
    )
    if volume.status.head:
        await collect_layers(environment)
    await make_layer(environment, layer.meta.id)


async def fork(
    actor: VMActor, vm: VM, template: Template, macs: Mapping[str, str], *, warm: bool
) -> tuple[QemuMachine, Steps | None]:
    """Lets a clone go on from what its template has in memory; nothing leads into it yet.
    ``macs``: its adapters' addresses until now, and the new ones. ``warm``: the guest is one that
    nobody has used, to be the VM's first. What the guest's helper was told to do first is returned,
    too, if one waits in it.

    Raises:
        UndercroftError: it did not work; nothing runs.
    """
    environment = actor.environment
    facts = await asyncio.to_thread(_facts, environment, vm, template, warm)
    async with environment.start_slots:
        machine = await load(actor, vm, template)
        try:
            return machine, await _go(environment, machine, vm, facts, macs, warm)
        except BaseException:
            await asyncio.shield(machine.kill())
            raise


async def load(actor: VMActor, vm: VM, template: Template, *, room: int = 0) -> QemuMachine:
    """Starts a machine that is about to go on from what a template has in memory. ``room``: bytes
    that are kept for its cloud-init seed.

    Raises:
        UndercroftError: it did not work; nothing runs.
    """
    environment = actor.environment
    seed = await make_seed(environment, vm, room=room)
    disks = await plan_disks(environment, vm)
    directory = environment.template_directory(template.meta.id) / "memory"
    plan = await asyncio.to_thread(fork_plan, directory)
    plan = msgspec.structs.replace(
        plan,
        id=vm.meta.id,
        name=vm.meta.name,
        uuid=vm_uuid(vm.meta.id),
        directory=str(environment.vm_directory(vm.meta.id)),
        run_directory=str(environment.run_directory(vm.meta.id)),
        disks=disks,
        cdroms=await plan_cdroms(vm),
        seed=str(seed) if seed is not None else plan.seed,
        ports=without_forwards(plan_ports(vm)),
        vmgenid=generation_id(vm) if plan.vmgenid is not None else None,
        uid=vm.status.uid,
        gid=vm.status.uid,
        generation=vm.meta.generation,
    )
    emulator = await environment.emulator(vm.spec.arch)
    return await QemuMachine.start(plan, emulator, on_event=actor.on_event, hold=True)


async def go_on(
    actor: VMActor, vm: VM, template: Template, macs: Mapping[str, str], *, warm: bool
) -> tuple[bool, Steps | None]:
    """As `fork`, with the actor's machine, which was loaded before it was known for whom. Whether
    that could be done; if not, nothing has."""
    environment, machine = actor.environment, actor.machine
    if machine is None or machine.run_state is not RunState.PAUSED:
        return False, None
    facts = await asyncio.to_thread(_facts, environment, vm, template, warm)
    seed = machine.plan.seed
    if seed is not None and not await remake_seed(Path(seed), vm):
        return False, None
    machine.rename(vm.meta.name)
    return True, await _go(environment, machine, vm, facts, macs, warm)


async def _go(
    environment: Environment,
    machine: QemuMachine,
    vm: VM,
    facts: GuestFacts | None,
    macs: Mapping[str, str],
    warm: bool,
) -> Steps | None:
    steps = await asyncio.to_thread(_steps, environment, vm, facts, macs, warm)
    await machine.go(steps.batch if steps is not None else None)
    return steps


def _facts(environment: Environment, vm: VM, template: Template, warm: bool) -> GuestFacts | None:
    """What is known of the guest that is frozen; with ``warm``, that all can be done which a first
    boot would have done. Blocks."""
    directory = environment.template_directory(template.meta.id)
    facts = read_facts(directory)
    if not warm:
        return facts
    user = vm.spec.guest.user or "root"
    if facts is None or (vm.spec.guest.ssh_keys and user not in facts.users):
        raise DataError(f"the guest of {template.label} takes no keys", object=template.label)
    with contextlib.suppress(OSError):
        os.utime(directory)  # by which is known what was not used for longest
    return facts


def _steps(
    environment: Environment,
    vm: VM,
    facts: GuestFacts | None,
    macs: Mapping[str, str],
    warm: bool,
) -> Steps | None:
    if facts is None:
        return None
    keys = host_keys(vm.meta.name) if facts.keys else {}
    steps = plan_steps(vm, facts, macs, keys, environment.clock())
    if warm:
        admit(steps, vm)
    return steps
