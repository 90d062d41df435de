"""Folding a VM's top layers into those beneath them once nobody needs them apart: what a checkpoint
leaves behind when it is released."""

from __future__ import annotations

import asyncio

from undercroft.host.actor import VMActor
from undercroft.host.datastores import layer_file
from undercroft.host.environment import Environment
from undercroft.host.imaging import reported
from undercroft.host.layers import (
    Uses,
    chain,
    collect_layers,
    head_layer,
    plan_layers,
    volume_status,
)
from undercroft.host.marks import begun_with, marks_moved, marks_of
from undercroft.host.merging import opened
from undercroft.host.outcome import TaskRun, to_its_end
from undercroft.host.planning import plan_disks
from undercroft.hypervisor.fold import begin_fold, end_fold
from undercroft.hypervisor.machine import QemuMachine, RunState
from undercroft.hypervisor.plan import DiskLayer
from undercroft.model.errors import NoSpaceError, UndercroftError
from undercroft.model.layer import Layer, LayerFormat
from undercroft.model.vm import VM, disk_units
from undercroft.model.volume import Volume
from undercroft.storage.files import allocated
from undercroft.store.interface import update

_PAUSED = "paused_by_us"


async def fold_layers(actor: VMActor, vm: VM, run: TaskRun, *, cheaper: bool = False) -> None:
    """Folds the top layers of a VM's disks, running or not, into those that only they lie on;
    ``cheaper``: only where that copies less than the other direction.

    Raises:
        UndercroftError, OSError: it did not work. All is as it was, and can be tried again.
    """
    environment = actor.environment
    await finish_folds(actor, vm, run)
    for unit, disk in zip(disk_units(vm.spec.disks), vm.spec.disks, strict=True):
        while (found := await _foldable(environment, disk.volume)) is not None:
            upper, lower = found
            if cheaper and await _taken(environment, upper) > await _taken(environment, lower):
                break
            planned = await plan_layers(environment, upper.meta.id, unit)
            keep = await marks_of(environment, vm.meta.id)
            fresh = await begun_with(environment, vm.meta.id, upper.meta.id)
            async with reported(run) as report:

                def tell(fraction: float) -> None:
                    report(fraction, "merging layers of the disk")

                tell(0.0)
                if actor.machine is not None:
                    await actor.machine.begin_fold(planned, keep, fresh, tell)
                    going = _go_over(actor, actor.machine, vm, run, planned, (disk.volume, *found))
                    await to_its_end(going)
                else:
                    async with opened(environment, vm, planned) as monitor:
                        await begin_fold(monitor, planned, keep, fresh, tell)
                        await end_fold(monitor, planned)
                    await _folded(environment, disk.volume, upper, lower)
            await collect_layers(environment)


async def finish_folds(actor: VMActor, vm: VM, run: TaskRun) -> None:
    """Finishes what a daemon had begun that died when QEMU wrote to the lower layer already: until
    that is written down the guest must not go on.

    Raises:
        UndercroftError: it did not work.
    """
    environment, machine = actor.environment, actor.machine
    if machine is not None and run.task.status.checkpoint.get(_PAUSED):
        for unit, disk in zip(disk_units(vm.spec.disks), vm.spec.disks, strict=True):
            layers = await chain(environment, await head_layer(environment, disk.volume))
            planned = await plan_layers(environment, layers[0].meta.id, unit)
            if len(layers) > 1 and await _gone_over(machine, planned):
                found = (disk.volume, layers[0], layers[1])
                await to_its_end(_go_over(actor, machine, vm, run, planned, found))
        await machine.drop_folded(await plan_disks(environment, vm))
    await _go_on(actor, run)


async def _taken(environment: Environment, layer: Layer) -> int:
    return await asyncio.to_thread(allocated, await layer_file(environment, layer))


async def _go_over(
    actor: VMActor,
    machine: QemuMachine,
    vm: VM,
    run: TaskRun,
    planned: tuple[DiskLayer, ...],
    disk: tuple[str, Layer, Layer],
) -> None:
    environment = actor.environment
    await _stand_still(machine, run)
    try:
        await machine.end_fold(planned)
    except UndercroftError:
        if await _gone_over(machine, planned):
            await _folded(environment, *disk)
        await _go_on(actor, run)
        raise
    await _folded(environment, *disk)
    await _go_on(actor, run)
    await machine.drop_folded(await plan_disks(environment, vm))


async def _gone_over(machine: QemuMachine, planned: tuple[DiskLayer, ...]) -> bool:
    """Whether QEMU writes to the lower layer already: a daemon died just then."""
    return planned[1].node in await machine.written()


async def _stand_still(machine: QemuMachine, run: TaskRun) -> None:
    if machine.run_state is RunState.IO_ERROR:  # it goes on as soon as there is room again
        await machine.give_up_merging()
        raise NoSpaceError(f"{machine.name} stands still because its disk cannot be written")
    if machine.run_state is RunState.RUNNING:
        await run.checkpoint(**{_PAUSED: True})
        await machine.pause()


async def _go_on(actor: VMActor, run: TaskRun) -> None:
    """Lets a guest go on that stands still because of us, or of a daemon that died. Where it writes
    to by now must have been written down."""
    if not run.task.status.checkpoint.get(_PAUSED):
        return
    machine = actor.machine
    if machine is not None and machine.run_state is RunState.PAUSED:
        await machine.resume()
    await run.checkpoint(**{_PAUSED: False})


async def _folded(environment: Environment, volume: str, upper: Layer, lower: Layer) -> None:
    """Writes that the lower layer is the disk."""
    await marks_moved(environment, upper.meta.id, lower.meta.id)
    await update(environment.store, Volume, volume, lambda v: volume_status(v, head=lower.meta.id))


async def _foldable(environment: Environment, volume: str) -> tuple[Layer, Layer] | None:
    """The layer that a volume writes to and the one beneath it, if nobody needs them apart."""
    layers = await chain(environment, await head_layer(environment, volume))
    if len(layers) < 2:
        return None
    upper, lower = layers[0], layers[1]
    uses = await Uses.read(environment)
    if {upper.meta.id, lower.meta.id} & uses.frozen or uses.children.get(upper.meta.id):
        return None
    if lower.meta.id in uses.heads or uses.children.get(lower.meta.id) != [upper.meta.id]:
        return None
    if lower.spec.format is not LayerFormat.QCOW2:  # it has no room for marks
        return None
    # What is written from then on would be where it was not to be, and in the clear.
    place = (upper.spec.datastore, upper.spec.encrypted)
    if place != (lower.spec.datastore, lower.spec.encrypted):
        return None
    if upper.spec.size != lower.spec.size:  # the disk has grown: it is merged the other way
        return None
    return upper, lower
