"""Where disks are put, and what keeps a datastore there."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.operations.world import HOST, World
from undercroft.model.base import Meta
from undercroft.model.datastore import LOCAL, Datastore, DatastoreSpec, DatastoreState
from undercroft.model.errors import (
    AlreadyExistsError,
    ForbiddenError,
    InUseError,
    InvalidError,
    NotFoundError,
    StaleError,
    UnavailableError,
    WrongStateError,
)
from undercroft.model.event import Event
from undercroft.model.layer import Layer, LayerSpec
from undercroft.model.names import new_id
from undercroft.model.requests import DatastoreChange, DatastoreCreate, VolumeClone, VolumeCreate
from undercroft.model.units import GiB
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.access import SYSTEM, VIEW, Caller
from undercroft.operations.context import find, scope
from undercroft.store.interface import Claim, Delete, Put, Transaction, update


@pytest.fixture
async def world(world: World) -> World:
    """With the datastore that every host has."""
    local = Datastore(
        meta=Meta(id=new_id("datastore"), name=LOCAL, created=1.0),
        spec=DatastoreSpec(host=HOST, path="/data/volumes", builtin=True, default=True),
    )
    claim = Claim(scope("datastore"), LOCAL, local.meta.id)
    await world.store.transact(Transaction(claims=[claim], puts=[Put(local)]))
    return world


async def made(world: World, name: str = "fast", **values: object) -> Datastore:
    request = msgspec.convert({"name": name, "path": f"/srv/{name}", **values}, DatastoreCreate)
    return (await world.operations.datastores.create(SYSTEM, request)).record


async def defaults(world: World) -> list[str]:
    return [item.meta.name for item in await world.all(Datastore) if item.spec.default]


async def volume(world: World, name: str) -> Volume:
    return (await find(world.store, Volume, name)).record


async def put_state(world: World, datastore: Datastore, state: DatastoreState) -> None:
    def change(record: Datastore) -> Datastore:
        status = msgspec.structs.replace(record.status, state=state)
        return msgspec.structs.replace(record, status=status)

    await update(world.store, Datastore, datastore.meta.id, change)


async def with_layer(world: World, name: str, datastore: Datastore | None, below: str = "") -> str:
    """Gives a volume a layer, as its host would."""
    layer = Layer(
        meta=Meta(id=new_id("layer"), name="x", created=1.0),
        spec=LayerSpec(
            host=HOST,
            size=GiB,
            parent=below or None,
            datastore=datastore.meta.id if datastore else None,
        ),
    )
    await world.store.transact(Transaction(puts=[Put(layer)]))

    def change(record: Volume) -> Volume:
        status = msgspec.structs.replace(record.status, state=VolumeState.READY, head=layer.meta.id)
        return msgspec.structs.replace(record, status=status, tasks=())

    await update(world.store, Volume, (await volume(world, name)).meta.id, change)
    return layer.meta.id


async def test_disks_go_where_they_are_told_to(world: World) -> None:
    fast = await made(world)
    await world.operations.volumes.create(
        SYSTEM, VolumeCreate(name="data", size=GiB, datastore="fast")
    )
    assert (await volume(world, "data")).spec.datastore == fast.meta.id
    await world.created("web1", disk=GiB, datastore="fast")
    assert (await volume(world, "web1-boot")).spec.datastore == fast.meta.id
    await world.created("web2", disk=GiB)
    assert (await volume(world, "web2-boot")).spec.datastore is None
    with pytest.raises(NotFoundError):
        await world.created("web3", disk=GiB, datastore="slow")


async def test_exactly_one_is_the_default(world: World) -> None:
    fast = await made(world, default=True)
    assert await defaults(world) == ["fast"]
    await world.created("web1", disk=GiB)
    assert (await volume(world, "web1-boot")).spec.datastore == fast.meta.id
    await world.created("web2", disk=GiB, datastore=LOCAL)
    assert (await volume(world, "web2-boot")).spec.datastore is None
    await made(world, "slow")
    await world.operations.datastores.set(SYSTEM, "slow", DatastoreChange(default=True))
    assert await defaults(world) == ["slow"]
    with pytest.raises(InvalidError, match="cease"):
        await world.operations.datastores.set(SYSTEM, "slow", DatastoreChange(default=False))
    await world.operations.datastores.remove(SYSTEM, "slow")
    assert await defaults(world) == [LOCAL]


@pytest.mark.parametrize(
    "values",
    [
        {"path": "srv/fast"},
        {"path": "/srv/\0"},
        {"path": "/" + "x" * 2000},
        {"warning": 0.9, "critical": 0.8},
        {"name": "Fast"},
        {"labels": {"": "x"}},
    ],
)
async def test_what_makes_no_sense_is_refused(world: World, values: dict[str, object]) -> None:
    with pytest.raises(InvalidError):
        await made(world, **{"name": "fast", **values})  # type: ignore[arg-type]
    assert len(await world.all(Datastore)) == 1


async def test_names_are_taken_once(world: World) -> None:
    await made(world)
    with pytest.raises(AlreadyExistsError):
        await made(world)
    await made(world, "slow")
    with pytest.raises(AlreadyExistsError):
        await world.operations.datastores.set(SYSTEM, "slow", DatastoreChange(name="fast"))
    with pytest.raises(InvalidError, match="keeps its name"):
        await world.operations.datastores.set(SYSTEM, LOCAL, DatastoreChange(name="x"))
    await world.operations.datastores.set(SYSTEM, "slow", DatastoreChange(name="slower"))
    await made(world, "slow")


async def test_only_what_was_seen_is_changed(world: World) -> None:
    await made(world)
    change = DatastoreChange(warning=0.5)
    found = await world.operations.datastores.get(SYSTEM, "fast")
    changed = await world.operations.datastores.set(SYSTEM, "fast", change, found.revision)
    assert changed.record.spec.warning == 0.5
    with pytest.raises(StaleError):
        await world.operations.datastores.set(
            SYSTEM, "fast", DatastoreChange(warning=0.6), found.revision
        )


async def test_one_that_is_needed_stays(world: World) -> None:
    fast = await made(world)
    remove = world.operations.datastores.remove
    with pytest.raises(InUseError, match="data directory"):
        await remove(SYSTEM, LOCAL)
    # Before its host has made it, by its head, by what that lies on, by nothing but the layer.
    await world.operations.volumes.create(
        SYSTEM, VolumeCreate(name="data", size=GiB, datastore="fast")
    )
    with pytest.raises(InUseError, match="volume data"):
        await remove(SYSTEM, "fast")
    below = await with_layer(world, "data", fast)
    with pytest.raises(InUseError, match="volume data"):
        await remove(SYSTEM, "fast")
    await with_layer(world, "data", None, below)
    with pytest.raises(InUseError, match="volume data"):
        await remove(SYSTEM, "fast")
    assert (await find(world.store, Datastore, "fast")).record.status.state is DatastoreState.READY
    data = await volume(world, "data")
    await world.store.transact(Transaction(deletes=[Delete(Volume, data.meta.id)]))
    with pytest.raises(InUseError, match="a snapshot"):
        await remove(SYSTEM, "fast")
    await world.store.transact(Transaction(deletes=[Delete(Layer, below)]))
    await remove(SYSTEM, "fast")
    assert [item.meta.name for item in await world.all(Datastore)] == [LOCAL]
    assert "datastore.removed" in [event.type for event in await world.all(Event)]


async def test_nothing_is_put_where_it_cannot_be(world: World) -> None:
    fast = await made(world, default=True)
    for state, error in (
        (DatastoreState.UNAVAILABLE, UnavailableError),
        (DatastoreState.REMOVING, WrongStateError),
    ):
        await put_state(world, fast, state)
        for where in (None, "fast"):
            with pytest.raises(error, match="fast"):
                await world.created("web1", disk=GiB, datastore=where)
    await world.created("web1", disk=GiB, datastore=LOCAL)


async def test_a_clone_lies_beside_its_source_unless_told_otherwise(world: World) -> None:
    fast = await made(world, default=True)
    await world.operations.volumes.create(
        SYSTEM, VolumeCreate(name="data", size=GiB, datastore=LOCAL)
    )
    await with_layer(world, "data", None)
    await world.operations.volumes.clone(SYSTEM, "data", VolumeClone(name="one"))
    assert (await volume(world, "one")).spec.datastore is None
    await with_layer(world, "data", None)
    await world.operations.volumes.clone(SYSTEM, "data", VolumeClone(name="two", datastore="fast"))
    assert (await volume(world, "two")).spec.datastore == fast.meta.id


async def test_who_may_only_look_changes_nothing(world: World) -> None:
    viewer = Caller("eve", VIEW)
    assert (await world.operations.datastores.list(viewer)).items
    with pytest.raises(ForbiddenError):
        await world.operations.datastores.create(viewer, DatastoreCreate(name="x", path="/x"))
    with pytest.raises(ForbiddenError):
        await world.operations.datastores.set(viewer, LOCAL, DatastoreChange(warning=0.5))
    with pytest.raises(ForbiddenError):
        await world.operations.datastores.remove(viewer, LOCAL)
