"""What is written down when volumes come to VMs, go from them, and grow."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from undercroft.host.datastores import layer_file
from undercroft.host.environment import Environment
from undercroft.host.heads import own_head
from undercroft.host.layers import get_layer, head_layer, layer_key
from undercroft.host.outcome import TaskRun
from undercroft.model.errors import InvalidError
from undercroft.model.layer import Layer
from undercroft.model.units import format_size
from undercroft.model.vm import VM, Disk, disk_units
from undercroft.model.volume import Volume
from undercroft.storage.volumes import resize_volume
from undercroft.store.interface import update

_Sized = TypeVar("_Sized", Volume, Layer)


async def grow(environment: Environment, volume: Volume, size: int, *, file: bool) -> None:
    """Makes the top layer of a volume larger, and writes that down; ``file``: also its file, which
    nobody has open. The layers beneath, which snapshots have, stay as they are.

    Raises:
        InvalidError: it would become smaller. NoSpaceError, ProgramError: it did not work.
    """
    if file:
        await own_head(environment, volume.meta.id)
    layer = await get_layer(environment, await head_layer(environment, volume.meta.id))
    if size < layer.spec.size:
        raise InvalidError(
            f"{volume.label} has {format_size(layer.spec.size)} already", object=volume.label
        )
    if file:
        key = await layer_key(environment, layer)
        await resize_volume(
            await layer_file(environment, layer),
            size,
            format=layer.spec.format.value,
            preallocate=layer.spec.preallocated,
            key=Path(key) if key is not None else None,
        )
    await update(environment.store, Layer, layer.meta.id, lambda old: sized(old, size))
    await update(environment.store, Volume, volume.meta.id, lambda old: sized(old, size))


async def free_volume(environment: Environment, id: str, vm: str) -> None:
    """Writes that a VM does not have a volume any more."""

    def change(volume: Volume) -> Volume:
        if vm not in (volume.spec.vm, volume.spec.attached):
            return volume
        spec = msgspec.structs.replace(volume.spec, vm=None, attached=None)
        return msgspec.structs.replace(volume, spec=spec)

    await update(environment.store, Volume, id, change)


async def free_attached(environment: Environment, vm: str) -> None:
    """Writes that a VM which is on its way out does not have the volumes any more that outlive
    it."""
    for item in (await environment.store.list(Volume)).items:
        if item.record.spec.attached == vm:
            await free_volume(environment, item.record.meta.id, vm)


async def not_attached(environment: Environment, vm: VM, run: TaskRun) -> None:
    """Sees to a volume that was to be attached and was not."""
    id = str(run.arguments.get("volume", ""))
    if disk_of(vm, id) is None:
        await free_volume(environment, id, vm.meta.id)


def sized(record: _Sized, size: int) -> _Sized:
    """The volume or layer with another size."""
    spec = msgspec.structs.replace(record.spec, size=size)
    return msgspec.structs.replace(record, spec=spec)


def disk_of(vm: VM, volume: str) -> tuple[Disk, int] | None:
    """How a VM has a volume, and at which place."""
    for disk, unit in zip(vm.spec.disks, disk_units(vm.spec.disks), strict=True):
        if disk.volume == volume:
            return disk, unit
    return None
