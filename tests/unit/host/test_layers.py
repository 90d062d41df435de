"""Which layers are needed, and that no other stays."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from tests.unit.host.rig import Rig
from undercroft.host.layers import (
    Uses,
    chain,
    collect_layers,
    get_layer,
    head_layer,
    make_layer,
    new_layer,
    plan_layers,
    rename_volumes,
    volume_status,
)
from undercroft.model.base import Meta
from undercroft.model.layer import Layer, LayerSpec
from undercroft.model.snapshot import (
    Snapshot,
    SnapshotDisk,
    SnapshotSpec,
    SnapshotState,
    SnapshotStatus,
)
from undercroft.model.units import GiB
from undercroft.model.volume import Volume, VolumeSpec, VolumeStatus
from undercroft.store.interface import Put, Transaction, update


def meta(id: str) -> Meta:
    return Meta(id=id, name=id, created=0.0)


def layer(id: str, parent: str | None) -> Layer:
    return Layer(meta=meta(id), spec=LayerSpec(host="h", size=GiB, parent=parent))


def volume(id: str, head: str) -> Volume:
    spec = VolumeSpec(size=GiB, host="h")
    return Volume(meta=meta(id), spec=spec, status=VolumeStatus(head=head))


def snapshot(id: str, held: str, following: str, state: SnapshotState) -> Snapshot:
    disk = SnapshotDisk(volume="v", layer=held, next=following)
    status = SnapshotStatus(state=state, disks=(disk,))
    return Snapshot(meta=meta(id), spec=SnapshotSpec(vm="vm"), status=status)


@given(st.integers(1, 30), st.randoms(use_true_random=False))
def test_what_is_left_is_what_can_be_reached(count: int, rng: random.Random) -> None:
    ids = [f"layer{n}" for n in range(count)]
    layers = [layer(id, rng.choice([None, *ids[:n]]) if n else None) for n, id in enumerate(ids)]
    parents = {item.meta.id: item.spec.parent for item in layers}
    volumes = [volume(f"v{n}", rng.choice(ids)) for n in range(rng.randrange(4))]
    snapshots = [
        snapshot(f"s{n}", rng.choice(ids), rng.choice(ids), rng.choice(list(SnapshotState)))
        for n in range(rng.randrange(4))
    ]
    wanted: set[str] = set()
    roots = [item.status.head for item in volumes]
    for item in snapshots:
        roots.append(item.status.disks[0].layer)
        if item.status.state is SnapshotState.PENDING:
            roots.append(item.status.disks[0].next)
    for root in roots:
        at: str | None = root
        while at is not None and at not in wanted:
            wanted.add(at)
            at = parents[at]
    uses = Uses(layers, volumes, snapshots)
    while unneeded := uses.unneeded():
        uses.forget(unneeded)
    assert set(uses.layers) == wanted


async def test_unneeded_layers_go_with_their_files(rig: Rig) -> None:
    await rig.close()
    environment = rig.environment
    vm = await rig.world.created("web1", disk=GiB)
    id = vm.spec.disks[0].volume
    first = await head_layer(environment, id)
    await make_layer(environment, first)
    second = new_layer(environment, GiB, parent=await get_layer(environment, first))
    await rig.store.transact(Transaction(puts=[Put(second)]))
    await make_layer(environment, second.meta.id)
    await update(rig.store, Volume, id, lambda v: volume_status(v, head=second.meta.id))
    await collect_layers(environment)
    assert [item.meta.id for item in await chain(environment, second.meta.id)] == [
        second.meta.id,
        first,
    ]
    top, below = await plan_layers(environment, second.meta.id, 3)
    assert (top.node, below.node) == (f"{second.meta.id}.3", f"{first}.3")
    await update(rig.store, Volume, id, lambda v: volume_status(v, head=first))
    await collect_layers(environment)
    assert [item.meta.id for item in await rig.world.all(Layer)] == [first]
    assert not environment.layer_path(second.meta.id).exists()
    assert environment.layer_path(first).exists()


async def test_files_from_before_there_were_layers_are_renamed(rig: Rig) -> None:
    directory = rig.environment.directory.volumes
    (directory / "vol-0123456789abcdef.qcow2").write_bytes(b"old")
    rename_volumes(directory)
    rename_volumes(directory)
    assert (directory / "layer-0123456789abcdef.qcow2").read_bytes() == b"old"
    assert len(list(directory.iterdir())) == 1
