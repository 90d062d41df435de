"""Volumes that belong to no VM."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.operations.world import HOST, World
from undercroft.model.base import Meta
from undercroft.model.errors import (
    AlreadyExistsError,
    BusyError,
    ForbiddenError,
    InUseError,
    InvalidError,
    NotFoundError,
    WrongStateError,
)
from undercroft.model.layer import Layer, LayerSpec
from undercroft.model.names import new_id
from undercroft.model.requests import VolumeClone, VolumeCreate
from undercroft.model.snapshot import Snapshot, SnapshotDisk, SnapshotSpec, SnapshotStatus
from undercroft.model.task import Task
from undercroft.model.units import GiB
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.access import SYSTEM, VIEW, Caller
from undercroft.operations.context import find
from undercroft.operations.volume_tree import layer_tree
from undercroft.operations.volume_use import check_idle
from undercroft.store.interface import Put, Transaction, update


async def made(world: World, name: str, **values: object) -> Volume:
    """A volume that the host has made."""
    request = msgspec.convert({"name": name, "size": GiB, **values}, VolumeCreate)
    await world.operations.volumes.create(SYSTEM, request)
    id = (await find(world.store, Volume, name)).record.meta.id

    def ready(volume: Volume) -> Volume:
        status = msgspec.structs.replace(volume.status, state=VolumeState.READY, head="layer-x")
        return msgspec.structs.replace(volume, status=status, tasks=())

    done = await update(world.store, Volume, id, ready)
    assert done is not None
    return done.record


async def test_a_volume_belongs_to_nobody(world: World) -> None:
    task = await world.operations.volumes.create(SYSTEM, VolumeCreate(name="data", size=GiB))
    volume = (await find(world.store, Volume, "data")).record
    assert (volume.spec.vm, volume.spec.size, volume.tasks) == (None, GiB, (task.meta.id,))
    assert volume.status.state is VolumeState.PENDING
    with pytest.raises(AlreadyExistsError):
        await world.operations.volumes.create(SYSTEM, VolumeCreate(name="data", size=GiB))


@pytest.mark.parametrize(
    "request_",
    [
        VolumeCreate(name="data"),
        VolumeCreate(name="data", size=0),
        VolumeCreate(name="data", size=1000),
        VolumeCreate(name="Data", size=GiB),
        VolumeCreate(name="data", size=GiB, labels={"": "x"}),
    ],
)
async def test_what_makes_no_sense_is_refused(world: World, request_: VolumeCreate) -> None:
    with pytest.raises(InvalidError):
        await world.operations.volumes.create(SYSTEM, request_)
    assert not await world.all(Volume)
    assert not await world.all(Task)


async def test_one_that_begins_as_an_image_is_as_large(world: World) -> None:
    image = await world.image("debian:12")
    content = image.status.content
    assert content is not None
    volume = await made(world, "root", size=None, source="debian:12")
    assert (volume.spec.size, volume.spec.image) == (content.virtual_size, image.meta.id)
    with pytest.raises(InvalidError):
        await made(world, "small", size=512, source="debian:12")
    with pytest.raises(NotFoundError):
        await made(world, "other", source="nothing")


async def test_an_image_that_a_volume_is_to_begin_as_stays(world: World) -> None:
    await world.image("debian:12")
    await world.operations.volumes.create(SYSTEM, VolumeCreate(name="root", source="debian:12"))
    with pytest.raises(InUseError, match="volume root"):
        await world.operations.images.remove(SYSTEM, "debian:12")


async def test_removal_is_asked_for_once(world: World) -> None:
    await made(world, "data")
    first = await world.operations.volumes.remove(SYSTEM, "data")
    assert await world.operations.volumes.remove(SYSTEM, "data") == first
    volume = (await find(world.store, Volume, "data")).record
    assert volume.status.state is VolumeState.REMOVING


async def test_one_that_is_needed_stays(world: World) -> None:
    vm = await world.created("web1", disk=GiB)
    with pytest.raises(InUseError, match="web1"):
        await world.operations.volumes.remove(SYSTEM, "web1-boot")
    volume = await made(world, "data")
    snapshot = Snapshot(
        meta=Meta(id=new_id("snapshot"), name="before", created=0.0),
        spec=SnapshotSpec(vm=vm.meta.id),
        status=SnapshotStatus(
            disks=(SnapshotDisk(volume=volume.meta.id, layer="layer-a", next="layer-b"),)
        ),
    )
    await world.store.transact(Transaction(puts=[Put(snapshot)]))
    with pytest.raises(InUseError, match="snapshot before of vm web1") as raised:
        await world.operations.volumes.remove(SYSTEM, "data")
    assert "croft snapshot rm web1 before" in (raised.value.action or "")


async def test_the_tree_tells_which_vm_a_snapshot_is_of(world: World) -> None:
    vm = await world.created("web1", disk=GiB)
    layer = Layer(
        meta=Meta(id=new_id("layer"), name="layer", created=1.0),
        spec=LayerSpec(host=HOST, size=GiB),
    )
    disk = SnapshotDisk(volume=vm.spec.disks[0].volume, layer=layer.meta.id, next="layer-b")
    snapshot = Snapshot(
        meta=Meta(id=new_id("snapshot"), name="before", created=0.0),
        spec=SnapshotSpec(vm=vm.meta.id),
        status=SnapshotStatus(disks=(disk,)),
    )
    await world.store.transact(Transaction(puts=[Put(layer), Put(snapshot)]))
    (node,) = (await layer_tree(world.context)).nodes
    assert [(keeper.kind, keeper.name, keeper.of) for keeper in node.kept] == [
        ("snapshot", "before", "web1")
    ]


async def test_one_that_something_is_done_with_is_left_alone(world: World) -> None:
    await world.operations.volumes.create(SYSTEM, VolumeCreate(name="data", size=GiB))
    with pytest.raises(WrongStateError):
        await world.operations.volumes.remove(SYSTEM, "data")
    volume = await made(world, "other")
    check_idle(volume)
    with pytest.raises(BusyError):
        check_idle(msgspec.structs.replace(volume, tasks=("task-1",)))


async def test_who_may_only_look_makes_and_removes_none(world: World) -> None:
    await made(world, "data")
    viewer = Caller("viewer", VIEW)
    assert (await world.operations.volumes.get(viewer, "data")).record.meta.name == "data"
    with pytest.raises(ForbiddenError):
        await world.operations.volumes.create(viewer, VolumeCreate(name="x", size=GiB))
    with pytest.raises(ForbiddenError):
        await world.operations.volumes.remove(viewer, "data")


async def test_a_clone_waits_its_turn_where_its_source_is(world: World) -> None:
    vm = await world.created("web1", disk=GiB)
    boot = vm.spec.disks[0].volume

    def ready(volume: Volume) -> Volume:
        status = msgspec.structs.replace(volume.status, state=VolumeState.READY, head="layer-x")
        return msgspec.structs.replace(volume, status=status)

    await update(world.store, Volume, boot, ready)
    task = await world.operations.volumes.clone(SYSTEM, "web1-boot", VolumeClone(name="copy"))
    assert (await world.vm("web1")).tasks[-1] == task.meta.id
    await made(world, "data")
    full = await world.operations.volumes.clone(SYSTEM, "data", VolumeClone(name="b", full=True))
    clone = (await find(world.store, Volume, "b")).record
    assert clone.tasks == (full.meta.id,)  # it has another, that waits for the source's
    branching = (await find(world.store, Volume, "data")).record.tasks
    assert len(branching) == 1
    with pytest.raises(BusyError):  # one at a time
        await world.operations.volumes.clone(SYSTEM, "data", VolumeClone(name="c"))
    with pytest.raises(WrongStateError):  # it has nothing on it yet
        await world.operations.volumes.clone(SYSTEM, "b", VolumeClone(name="c"))


async def test_a_clone_is_not_smaller_and_has_a_name_of_its_own(world: World) -> None:
    await made(world, "data")
    clone = world.operations.volumes.clone
    with pytest.raises(InvalidError, match="a clone of 512M is smaller than volume data with 1G"):
        await clone(SYSTEM, "data", VolumeClone(name="b", size=GiB // 2))
    with pytest.raises(AlreadyExistsError) as taken:
        await clone(SYSTEM, "data", VolumeClone(name="data"))
    assert taken.value.action == "choose another name"  # and not: remove that one
    await world.image("both")
    await made(world, "both")
    with pytest.raises(InvalidError, match="image and of a volume"):
        await world.operations.volumes.create(SYSTEM, VolumeCreate(name="x", source="both"))


async def test_flattening_is_asked_for_once(world: World) -> None:
    await made(world, "data")
    first = await world.operations.volumes.flatten(SYSTEM, "data")
    assert await world.operations.volumes.flatten(SYSTEM, "data") == first


async def test_what_lies_on_something_encrypted_is_encrypted(world: World) -> None:
    source = await made(world, "safe", encrypt=True)
    assert source.spec.encrypted
    clone = world.operations.volumes.clone
    with pytest.raises(InvalidError, match="encrypted, too"):
        await clone(SYSTEM, "safe", VolumeClone(name="open", encrypted=False))
    await clone(SYSTEM, "safe", VolumeClone(name="two"))
    assert (await find(world.store, Volume, "two")).record.spec.encrypted
    await made(world, "plain")
    await clone(SYSTEM, "plain", VolumeClone(name="shut", encrypted=True))
    assert (await find(world.store, Volume, "shut")).record.spec.encrypted
    other = await made(world, "other", encrypt=True)
    await clone(SYSTEM, "other", VolumeClone(name="open", full=True, encrypted=False))
    opened = (await find(world.store, Volume, "open")).record
    assert (opened.spec.source, opened.spec.encrypted) == (other.meta.id, False)


async def test_what_cannot_be_encrypted_is_refused(world: World) -> None:
    with pytest.raises(InvalidError, match="qcow2"):
        await made(world, "safe", encrypt=True, format="raw")
    await world.image("tiny", disk=None, virtual_size=0)
    with pytest.raises(InvalidError, match="no disk"):
        await world.created("web1", image="tiny", encrypt=True)
    vm = await world.created("web2", disk=GiB, encrypt=True)
    for disk in vm.spec.disks:
        assert (await find(world.store, Volume, disk.volume)).record.spec.encrypted
