"""How an actor makes a template of its VM, and how those go that nobody needs any more.

A template begins as a snapshot that nobody is shown: its layers are handed on from the one to the
other in one transaction. What the guest has in memory is put into a file that clones share.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import msgspec
import structlog

from undercroft.host.actor import Outcome, VMActor
from undercroft.host.environment import Environment
from undercroft.host.forgetting import forget
from undercroft.host.identity import leave, prepare, write_facts
from undercroft.host.layers import collect_layers, get_layer
from undercroft.host.outcome import TaskRun, change_status
from undercroft.host.snapshot_files import copy_besides, has_memory
from undercroft.host.snapshots import taken
from undercroft.host.snapshots import undo as undo_snapshot
from undercroft.hypervisor.fork import freeze, frozen, frozen_size
from undercroft.hypervisor.machine import RunState
from undercroft.model.errors import (
    DataError,
    QmpError,
    UndercroftError,
    UnsupportedError,
    error_from_problem,
)
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task
from undercroft.model.template import Template, TemplateDisk, TemplateState, TemplateStatus
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.operations.context import scope
from undercroft.storage.files import remove_tree, sync_directory
from undercroft.storage.threads import in_thread
from undercroft.store.interface import Delete, Put, Release, Transaction

log = structlog.get_logger(__name__)

PATIENCE = 2.0  # seconds after which somebody who waits for a template looks by themselves
SOON = 0.05  # the same where it is gone, and only why is not known yet


async def create(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Makes a template of what the VM is now; it stays what it is."""
    environment = actor.environment
    id = str(run.arguments["template"])
    found = await environment.store.get(Template, id)
    if found is None:
        raise DataError(f"template {id} is gone", object=f"template {id}")
    template = found.record
    if template.status.state is not TemplateState.READY:
        template = await _made(actor, vm, run, template)
    # The layers are the template's before they cease to be the snapshot's.
    kept = await environment.store.get(Snapshot, str(run.arguments["snapshot"]))
    if kept is not None:
        await forget(environment, kept.record)
    await notify(environment)

    def change(record: VM) -> VM:
        if actor.machine is None:  # it is off, or its end is still to be seen to
            return record
        return change_status(record, state=actor.present_state(record))

    if template.spec.passing:
        # Whoever waited for it may have been quicker than what comes after this.
        after = partial(collect_templates, environment)
        return Outcome(change, result={"template": id}, after=after)
    return Outcome(
        change,
        event="template.created",
        message=f"template {template.meta.name} was made from {vm.label}",
        result={"template": id},
    )


async def _made(actor: VMActor, vm: VM, run: TaskRun, template: Template) -> Template:
    environment = actor.environment
    if template.spec.memory and vm.spec.tpm:
        raise UnsupportedError(
            f"{vm.label} has a TPM, whose secrets its clones would share in memory",
            object=vm.label,
            action="leave the memory out: use --linked, or a template without --memory",
        )
    agent = actor.machine is not None and actor.machine.agent is not None
    agent = agent and bool(actor.machine and actor.machine.agent.channel.present)  # type: ignore[union-attr]
    directory = environment.template_directory(template.meta.id)
    snapshot = await _snapshot(actor, vm, run, template, directory)
    await run.commit()  # the VM is not needed any more for what follows
    disks = await _disks(environment, vm, snapshot)
    source = environment.snapshot_directory(snapshot)
    await in_thread(lambda _: copy_besides(source, directory))
    if template.spec.memory and not frozen(directory / "memory"):
        if not await has_memory(environment, snapshot):
            raise QmpError("the VM ended before its memory was saved", object=vm.label)
        await run.progress(None, "sharing the memory")
        await freeze(
            source / "memory",
            directory / "memory",
            await environment.emulator(vm.spec.arch),
            disks=[disk.size for disk in disks],
            uid=vm.status.uid,
            durable=not template.spec.passing,
        )
    await in_thread(lambda _: sync_directory(directory))
    status = TemplateStatus(
        state=TemplateState.READY,
        disks=disks,
        shape=vm.spec,
        memory=await asyncio.to_thread(frozen_size, directory / "memory"),
        agent=agent,
    )
    ready = msgspec.structs.replace(template, status=status)
    await environment.store.transact(Transaction(puts=[Put(ready)]))
    return ready


async def _snapshot(
    actor: VMActor, vm: VM, run: TaskRun, template: Template, directory: Path
) -> Snapshot:
    """Takes the snapshot; if it has memory, with a helper in it for those that go on from there."""
    machine = actor.machine
    if not template.spec.memory or machine is None or machine.run_state is not RunState.RUNNING:
        return await taken(actor, vm, run)
    begun = await actor.environment.store.get(Snapshot, str(run.arguments["snapshot"]))
    if begun is not None and await has_memory(actor.environment, begun.record):
        return await taken(actor, vm, run)  # what is known of the guest is of that moment
    await run.progress(None, "preparing the guest")
    facts = await prepare(machine)
    if facts is not None:
        facts = msgspec.structs.replace(facts, addresses=vm.status.addresses)
    await in_thread(lambda _: write_facts(directory, facts))
    try:
        return await taken(actor, vm, run)
    finally:
        await leave(machine, facts)


async def undo(actor: VMActor, vm: VM, run: TaskRun) -> Outcome:
    """Undoes what a task that failed or was cancelled has done of a template."""
    environment = actor.environment
    found = await environment.store.get(Template, str(run.arguments["template"]))
    if found is not None and found.record.status.state is not TemplateState.READY:
        await remove_template(environment, found.record)
    return await undo_snapshot(actor, vm, run)


async def _disks(environment: Environment, vm: VM, snapshot: Snapshot) -> tuple[TemplateDisk, ...]:
    disks = []
    for disk, kept in zip(vm.spec.disks, snapshot.status.disks, strict=True):
        found = await environment.store.get(Volume, disk.volume)
        if found is None:
            raise DataError(f"volume {disk.volume} of {vm.label} is gone", object=vm.label)
        layer = await get_layer(environment, kept.layer)  # the volume may have grown since
        image = found.record.spec.image
        disks.append(TemplateDisk(layer=kept.layer, size=layer.spec.size, image=image, disk=disk))
    return tuple(disks)


async def wait_for(environment: Environment, id: str, task: str | None) -> Template:
    """The template, once it is ready; ``task`` is that which makes it, if any does.

    Raises:
        UndercroftError: it is gone, or will never be there: why its task failed.
    """
    while True:
        found = await environment.store.get(Template, id)
        if found is not None and found.record.status.state is TemplateState.READY:
            return found.record
        # A template that is given up goes before the task that was to make it says why.
        making = await environment.store.get(Task, task) if task is not None else None
        over = making is None or making.record.status.state.final
        if over and (found is None or task is not None):
            raise _reason(id, making.record if making is not None else None)
        pause = SOON if found is None else PATIENCE
        try:
            async with asyncio.timeout(pause), environment.templates:
                await environment.templates.wait()
        except TimeoutError:
            pass


def _reason(id: str, making: Task | None) -> UndercroftError:
    """Why a template is not there, and will not be."""
    if making is None:
        return DataError(f"template {id} is gone", object=f"template {id}")
    if making.status.error is not None:
        return error_from_problem(making.status.error)
    source = making.spec.object
    return DataError(
        f"{source.kind} {source.name} was not frozen: that was cancelled",
        object=f"{source.kind} {source.name}",
    )


async def notify(environment: Environment) -> None:
    """Wakes those who wait for a template."""
    async with environment.templates:
        environment.templates.notify_all()


async def remove_template(environment: Environment, template: Template) -> None:
    """Removes a template; what VMs made from it need of it stays."""
    id = template.meta.id
    name = Release(scope("template"), template.meta.name, id)
    await environment.store.transact(
        Transaction(
            deletes=[Delete(Template, id)], releases=[] if template.spec.passing else [name]
        )
    )
    await remove_files(environment, id)
    await notify(environment)


async def remove_files(environment: Environment, id: str) -> None:
    """Removes what belonged to a template whose record is gone."""
    await in_thread(lambda _: remove_tree(environment.template_directory(id)))
    await collect_layers(environment)


async def collect_templates(environment: Environment) -> None:
    """Removes the templates that nobody needs: those that were to pass, once the VMs are there that
    they were made for, and those that were never finished."""
    templates = [item.record for item in (await environment.store.list(Template)).items]
    if not any(t.spec.passing or t.status.state is TemplateState.PENDING for t in templates):
        return
    wanted = {
        str(item.record.spec.arguments.get("template"))
        for item in (await environment.store.list(Task)).items
        if not item.record.status.state.final
    }
    for template in templates:
        unfinished = template.status.state is TemplateState.PENDING
        if template.meta.id not in wanted and (template.spec.passing or unfinished):
            await remove_template(environment, template)


def _remove(path: Path, _: object) -> None:
    remove_tree(path)


async def sweep_templates(environment: Environment) -> None:
    """Removes what a crash left of templates. For the agent, at its start."""
    await collect_templates(environment)
    known = {item.record.meta.id for item in (await environment.store.list(Template)).items}
    for path in await asyncio.to_thread(lambda: list(environment.directory.templates.iterdir())):
        if path.name not in known:
            await in_thread(partial(_remove, path))
