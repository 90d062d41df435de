"""Keeping chains of layers short: those that only the next one needs are merged into it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence

import msgspec

from undercroft.host.actor import VMActor
from undercroft.host.environment import Environment
from undercroft.host.imaging import reported
from undercroft.host.layers import Uses, chain, collect_layers, head_layer, plan_layers
from undercroft.host.marks import begun_with, marks_moved
from undercroft.host.outcome import TaskRun
from undercroft.hypervisor.merge import absorb, offline
from undercroft.hypervisor.plan import DiskLayer
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.layer import Layer, LayerFormat
from undercroft.model.vm import VM, disk_units
from undercroft.store.interface import update


async def merge_layers(actor: VMActor, vm: VM, run: TaskRun, *, raw: bool = True) -> None:
    """Merges what can be merged of the disks of a VM, running or not; ``raw``: also raw files into
    the qcow2 files that lie on them, which copies all that they hold.

    Raises:
        UndercroftError, OSError: it did not work. All is as it was, and can be tried again.
    """
    environment = actor.environment
    for unit, disk in zip(disk_units(vm.spec.disks), vm.spec.disks, strict=True):
        while (found := await _mergeable(environment, disk.volume, raw)) is not None:
            layers, at = found
            await _absorb(actor, vm, run, unit, layers, at)


async def flatten(actor: VMActor, vm: VM, run: TaskRun) -> None:
    """Has each disk of a VM take over all that it lies on but for its image, so that it needs no
    other's layers.

    Raises:
        UndercroftError, OSError: it did not work. All is as it was, and can be tried again.
    """
    environment = actor.environment
    for unit, disk in zip(disk_units(vm.spec.disks), vm.spec.disks, strict=True):
        while True:
            layers = await chain(environment, await head_layer(environment, disk.volume))
            if len(layers) < 2:
                break
            await _absorb(actor, vm, run, unit, layers, 0)


async def flatten_disk(actor: VMActor, vm: VM, run: TaskRun, volume: str) -> None:
    """Has one disk of a VM take over all that it lies on, and its image, too.

    Raises:
        UndercroftError, OSError: it did not work. All is as it was, and can be tried again.
    """
    unit = next(
        unit
        for unit, disk in zip(disk_units(vm.spec.disks), vm.spec.disks, strict=True)
        if disk.volume == volume
    )
    while True:
        layers = await chain(actor.environment, await head_layer(actor.environment, volume))
        if len(layers) < 2 and layers[0].spec.image is None:
            return
        await _absorb(actor, vm, run, unit, layers, 0)


async def _absorb(
    actor: VMActor, vm: VM, run: TaskRun, unit: int, layers: list[Layer], at: int
) -> None:
    """Has a layer of the disk at ``unit`` take over the one beneath it, and writes that down."""
    environment = actor.environment
    planned = await plan_layers(environment, layers[0].meta.id, unit)
    fresh = await begun_with(environment, vm.meta.id, layers[at].meta.id)
    async with reported(run) as report:

        def tell(fraction: float) -> None:
            report(fraction, "merging layers of the disk")

        tell(0.0)
        if actor.machine is not None:
            await actor.machine.absorb(planned, at, tell, fresh)
        else:
            async with opened(environment, vm, planned) as monitor:
                await absorb(monitor, planned, at, tell, fresh)
    await _skip(environment, layers[at], layers[at + 1] if at + 1 < len(layers) else None)
    await collect_layers(environment)


async def _mergeable(
    environment: Environment, volume: str, raw: bool
) -> tuple[list[Layer], int] | None:
    """A volume's chain, and the place in it of a layer that can take over the one beneath it."""
    layers = await chain(environment, await head_layer(environment, volume))
    uses = await Uses.read(environment)
    own = {layer.meta.id for layer in layers}
    for at in range(len(layers) - 1):
        lower = layers[at + 1].meta.id
        if not raw and layers[at + 1].spec.format is LayerFormat.RAW:
            continue
        if lower in uses.heads or lower in uses.frozen or len(uses.children[lower]) != 1:
            continue
        # A layer that another VM lies on must not be rewritten while that VM may be reading it.
        if uses.heads_above(layers[at].meta.id) <= own:
            return layers, at
    return None


@contextlib.asynccontextmanager
async def opened(
    environment: Environment, vm: VM, layers: Sequence[DiskLayer]
) -> AsyncIterator[Monitor]:
    mark = environment.vm_directory(vm.meta.id)
    emulator = await environment.emulator(vm.spec.arch)
    async with offline(layers, emulator, mark, vm.status.uid) as monitor:
        yield monitor


async def _skip(environment: Environment, upper: Layer, lower: Layer | None) -> None:
    """Writes that a layer lies on what was two beneath it, and has what was noted in that; on
    nothing, if that was its image."""
    if lower is not None:
        await marks_moved(environment, lower.meta.id, upper.meta.id)
    parent, image = (lower.spec.parent, lower.spec.image) if lower is not None else (None, None)
    spec = msgspec.structs.replace(upper.spec, parent=parent, image=image)
    await update(
        environment.store,
        Layer,
        upper.meta.id,
        lambda layer: msgspec.structs.replace(layer, spec=spec),
    )
