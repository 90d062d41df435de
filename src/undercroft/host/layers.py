"""The layers of volumes: their chains, their files, and who needs them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from undercroft.host.datastores import driver, file_name, layer_file
from undercroft.host.environment import Environment
from undercroft.hypervisor.plan import DiskFormat, DiskLayer
from undercroft.model.base import Meta
from undercroft.model.errors import DataError, StaleError, UnavailableError, WrongStateError
from undercroft.model.image import Image
from undercroft.model.layer import Layer, LayerFormat, LayerSpec, LayerState
from undercroft.model.names import new_id
from undercroft.model.snapshot import Snapshot, SnapshotState
from undercroft.model.template import Template
from undercroft.model.volume import Volume
from undercroft.storage.keys import read_key
from undercroft.storage.volumes import LayerFile
from undercroft.store.interface import Check, Delete, Put, Transaction, update


def new_layer(
    environment: Environment,
    size: int,
    *,
    parent: Layer | None = None,
    image: str | None = None,
    preallocated: bool = False,
    format: LayerFormat = LayerFormat.QCOW2,
    datastore: str | None = None,
    encrypted: bool | None = None,
) -> Layer:
    """A layer of this host that has no file yet; beside its ``parent``, unless another
    ``datastore`` (an id) is given, and encrypted if that is, unless it is said."""
    id = new_id("layer")
    if datastore is None and parent is not None:
        datastore = parent.spec.datastore
    if encrypted is None:
        encrypted = parent is not None and parent.spec.encrypted
    return Layer(
        meta=Meta(id=id, name=id, created=environment.clock()),
        spec=LayerSpec(
            host=environment.host,
            size=size,
            parent=parent.meta.id if parent is not None else None,
            image=image,
            preallocated=preallocated,
            format=format,
            datastore=datastore,
            encrypted=encrypted,
        ),
    )


MAX_LAYERS = 128
"""Of which a disk may consist: QEMU describes each with all beneath it."""


async def get_layer(environment: Environment, id: str) -> Layer:
    """The layer with this id.

    Raises:
        DataError: its record is gone.
    """
    found = await environment.store.get(Layer, id)
    if found is None:
        raise DataError(f"the record of {id} is gone", object=f"layer {id}")
    return found.record


async def chain(environment: Environment, head: str) -> list[Layer]:
    """A layer and all that lie beneath it, from the top down."""
    layers = [await get_layer(environment, head)]
    while (parent := layers[-1].spec.parent) is not None:
        layers.append(await get_layer(environment, parent))
    return layers


async def check_chain(environment: Environment, head: str) -> None:
    """Does nothing if the files of a layer and of all that lie beneath it are there.

    Raises:
        DataError: one is gone. UnavailableError: its datastore is not there.
    """
    for layer in await chain(environment, head):
        path = await layer_file(environment, layer)
        if not await asyncio.to_thread(path.exists):
            raise DataError(
                f"{path} is gone, which a disk lies on",
                object=layer.label,
                action="restore it from a backup; see what else is missing: croft host check",
            )


async def head_layer(environment: Environment, id: str) -> str:
    """The layer that a volume writes to; a first one, without a file, if it has none yet.

    Raises:
        DataError: the record of the volume is gone.
    """
    while True:
        found = await environment.store.get(Volume, id)
        if found is None:
            raise DataError(f"the record of volume {id} is gone", object=f"volume {id}")
        volume = found.record
        if volume.status.head:
            return volume.status.head
        spec = volume.spec
        layer = new_layer(
            environment,
            spec.size,
            image=spec.image,
            preallocated=spec.preallocated,
            format=spec.format,
            datastore=spec.datastore,
            encrypted=spec.encrypted,
        )
        wanted = volume_status(volume, head=layer.meta.id)
        with contextlib.suppress(StaleError):
            await environment.store.transact(
                Transaction(
                    checks=[Check(Volume, id, found.revision)], puts=[Put(wanted), Put(layer)]
                )
            )


def node_name(layer: str, index: int) -> str:
    """What QEMU calls a layer of disk ``index``: told apart, as disks may share layers."""
    return f"{layer}.{index}"


async def plan_layers(environment: Environment, head: str, index: int) -> tuple[DiskLayer, ...]:
    """The files of a chain as QEMU is to be told of them, from the top down.

    Raises:
        DataError: a layer, or the image at the bottom, is gone.
    """
    layers = await chain(environment, head)
    planned = [
        DiskLayer(
            path=str(await layer_file(environment, layer)),
            format=DiskFormat(layer.spec.format.value),
            node=node_name(layer.meta.id, index),
            key=await layer_key(environment, layer),
            thin=not layer.spec.preallocated,
        )
        for layer in layers
    ]
    if layers[-1].spec.image is not None:
        path, format = await image_disk(environment, layers[-1].spec.image)
        node = node_name(layers[-1].spec.image, index)
        planned.append(DiskLayer(path=str(path), format=format, node=node))
    return tuple(planned)


async def layer_key(environment: Environment, layer: Layer) -> str | None:
    """The path of the key of a layer; None: it is not encrypted.

    Raises:
        DataError: it is gone.
    """
    if not layer.spec.encrypted:
        return None
    path = environment.keys.path(layer.meta.id)
    await asyncio.to_thread(read_key, path)
    return str(path)


async def layer_files(environment: Environment, head: str) -> list[LayerFile]:
    """The files of a chain as tools are to be told of them, from the top down.

    Raises:
        DataError: a layer, its key, or the image at the bottom is gone.
    """
    return [
        LayerFile(Path(one.path), one.format.value, Path(one.key) if one.key else None)
        for one in await plan_layers(environment, head, 0)
    ]


async def image_disk(environment: Environment, id: str) -> tuple[Path, DiskFormat]:
    """The disk of an image.

    Raises:
        DataError: the image is gone, or has none.
    """
    found = await environment.store.get(Image, id)
    status = found.record.status if found is not None else None
    content = status.content if status is not None else None
    if status is None or status.digest is None or content is None or content.disk is None:
        raise DataError(
            f"image {id}, which a disk lies on, is gone",
            object=f"image {id}",
            action="see: croft image ls",
        )
    path = environment.data / "images" / status.digest / content.disk
    return path, DiskFormat(content.disk_format.value)


async def make_layer(
    environment: Environment,
    id: str,
    progress: Callable[[float], None] | None = None,
    marks: Sequence[str] = (),
) -> None:
    """Makes a layer's file; does nothing if it is there already. ``marks``: the bitmaps in which
    QEMU notes what is written to it.

    Raises:
        NoSpaceError: the disk is full. ProgramError: qemu-img failed.
        UnavailableError: its datastore is not there. WrongStateError: it lies on too many others.
    """
    layer = await get_layer(environment, id)
    path = await layer_file(environment, layer)
    if not path.exists():
        if len(await chain(environment, id)) > MAX_LAYERS:
            raise WrongStateError(
                f"the disk would consist of more than {MAX_LAYERS} layers",
                object=layer.label,
                action="remove snapshots, templates or clones that are not needed, or have the "
                "disk need nothing of others: croft volume flatten",
            )
        base: tuple[Path, str] | None = None
        if layer.spec.parent is not None:
            parent = await get_layer(environment, layer.spec.parent)
            base = await layer_file(environment, parent), parent.spec.format.value
        elif layer.spec.image is not None:
            base = await image_disk(environment, layer.spec.image)
        store = await driver(environment, layer.spec.datastore)
        key = await asyncio.to_thread(environment.keys.make, id) if layer.spec.encrypted else None
        await store.make(
            path.name,
            layer.spec.size,
            format=layer.spec.format.value,
            base=base,
            preallocate=layer.spec.preallocated,
            key=key,
            progress=progress,
            marks=marks,
        )
    await layer_is_made(environment, id)


async def layer_is_made(environment: Environment, id: str) -> None:
    """Writes that a layer's file is there."""
    await update(environment.store, Layer, id, _ready)


def volume_status(volume: Volume, **values: Any) -> Volume:
    """The volume with other values in its status."""
    return msgspec.structs.replace(volume, status=msgspec.structs.replace(volume.status, **values))


def _ready(layer: Layer) -> Layer:
    if layer.spec.whole:  # it has all that its image has
        layer = msgspec.structs.replace(layer, spec=msgspec.structs.replace(layer.spec, image=None))
    status = msgspec.structs.replace(layer.status, state=LayerState.READY)
    return msgspec.structs.replace(layer, status=status)


class Uses:
    """Who needs which layer, as the store had it at one moment."""

    def __init__(
        self,
        layers: Iterable[Layer],
        volumes: Iterable[Volume],
        snapshots: Iterable[Snapshot],
        templates: Iterable[Template] = (),
    ) -> None:
        self.layers = {layer.meta.id: layer for layer in layers}
        self.children: dict[str, list[str]] = {}
        for layer in self.layers.values():
            if layer.spec.parent is not None:
                self.children.setdefault(layer.spec.parent, []).append(layer.meta.id)
        self.heads = {volume.status.head: volume.meta.id for volume in volumes}
        self.frozen = {disk.layer for item in templates for disk in item.status.disks}
        for snapshot in snapshots:
            taking = snapshot.status.state is SnapshotState.PENDING
            for disk in snapshot.status.disks:
                for id in {disk.layer, disk.next} if taking else {disk.layer}:
                    self.frozen.add(id)

    @classmethod
    async def read(cls, environment: Environment) -> Uses:
        """Who needs which layer now."""
        store = environment.store
        known = {item.record.meta.id for item in (await store.list(Layer)).items}
        # A layer is handed on in this order, and comes to be together with something that needs
        # it. Those that came since are left alone, and what they lie on with them.
        snapshots = [item.record for item in (await store.list(Snapshot)).items]
        templates = [item.record for item in (await store.list(Template)).items]
        volumes = [item.record for item in (await store.list(Volume)).items]
        layers = [item.record for item in (await store.list(Layer)).items]
        uses = cls(layers, volumes, snapshots, templates)
        uses.frozen |= {layer.meta.id for layer in layers} - known
        uses.frozen |= environment.held
        return uses

    def needed(self, id: str) -> bool:
        """Whether anybody needs the layer: to write to, to go back to, or to lie on."""
        return bool(self.children.get(id)) or id in self.heads or id in self.frozen

    def heads_above(self, id: str) -> set[str]:
        """The layers that are written to and lie on this one, or are it."""
        found: set[str] = set()
        pending = [id]
        while pending:
            at = pending.pop()
            if at in self.heads:
                found.add(at)
            pending += self.children.get(at, [])
        return found

    def unneeded(self) -> list[Layer]:
        """The layers that nobody needs."""
        return [layer for id, layer in self.layers.items() if not self.needed(id)]

    def forget(self, layers: Iterable[Layer]) -> None:
        """Leaves these out, and what they needed."""
        for layer in layers:
            del self.layers[layer.meta.id]
            if layer.spec.parent is not None:
                self.children[layer.spec.parent].remove(layer.meta.id)


async def collect_layers(environment: Environment) -> None:
    """Removes all layers that nobody needs. The file goes first, so that a crash leaves no file
    without a record."""
    async with environment.layers_lock:
        uses = await Uses.read(environment)
        away: set[str] = set()
        while unneeded := [x for x in uses.unneeded() if x.meta.id not in away]:
            gone = []
            for layer in unneeded:
                try:
                    if layer.spec.encrypted:  # from now on it is only noise
                        await asyncio.to_thread(environment.keys.remove, layer.meta.id)
                    store = await driver(environment, layer.spec.datastore)
                    await store.remove(file_name(layer))
                except UnavailableError:  # it is removed when its datastore is there again
                    away.add(layer.meta.id)
                else:
                    gone.append(layer)
            deletes = [Delete(Layer, layer.meta.id) for layer in gone]
            if deletes:
                await environment.store.transact(Transaction(deletes=deletes))
            uses.forget(gone)


def rename_volumes(directory: Path) -> None:
    """Gives files of volumes from before there were layers the names that their layers have."""
    for path in directory.glob("vol-*.qcow2"):
        path.rename(path.with_name("layer-" + path.name.removeprefix("vol-")))
