"""What is told of datastores, and how their life goes on after a crash."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.unit.host.rig import Rig
from tests.unit.operations.world import HOST
from undercroft.host.datastores import filling, open_datastores
from undercroft.host.layers import collect_layers, head_layer, make_layer, volume_status
from undercroft.host.usage import measure
from undercroft.host.volume_check import check_volumes
from undercroft.model.base import Meta
from undercroft.model.datastore import (
    Datastore,
    DatastoreSpec,
    DatastoreState,
    Fill,
)
from undercroft.model.errors import UnavailableError
from undercroft.model.event import Event, EventLevel
from undercroft.model.layer import Layer
from undercroft.model.names import new_id
from undercroft.model.requests import VolumeCreate
from undercroft.model.units import GiB
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import find, scope
from undercroft.storage.datastores.directory import HALF, DirectoryDriver, prepare
from undercroft.storage.datastores.interface import Space
from undercroft.store.interface import Claim, Put, Transaction, update


@pytest.fixture
async def fast(rig: Rig, tmp_path: Path) -> Datastore:
    """A datastore beside the one in the data directory."""
    await rig.close()
    await open_datastores(rig.environment)
    path = tmp_path / "srv"
    id = new_id("datastore")
    prepare(path, id, HOST, lambda _: False)
    record = Datastore(
        meta=Meta(id=id, name="fast", created=1.0),
        spec=DatastoreSpec(host=HOST, path=str(path)),
    )
    claim = Claim(scope("datastore"), "fast", id)
    await rig.store.transact(Transaction(claims=[claim], puts=[Put(record)]))
    return record


async def now(rig: Rig, name: str = "fast") -> Datastore:
    await measure(rig.environment, now=True)
    return (await find(rig.store, Datastore, name)).record


async def told(rig: Rig) -> list[tuple[str, EventLevel]]:
    events = await rig.world.all(Event)
    return [(e.type, e.level) for e in events if e.type.startswith("datastore.")]


async def made(rig: Rig, name: str) -> Volume:
    request = VolumeCreate(name=name, size=20 * GiB, datastore="fast")
    await rig.world.operations.volumes.create(SYSTEM, request)
    volume = (await find(rig.store, Volume, name)).record
    await make_layer(rig.environment, await head_layer(rig.environment, volume.meta.id))
    return (await find(rig.store, Volume, name)).record


async def test_the_one_in_the_data_directory_is_there_once(rig: Rig) -> None:
    await open_datastores(rig.environment)
    await open_datastores(rig.environment)
    (local,) = await rig.world.all(Datastore)
    assert (local.meta.name, local.spec.builtin, local.spec.default) == ("local", True, True)


async def test_what_filling_up_is_told(
    rig: Rig, fast: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 60

    async def space(self: DirectoryDriver) -> Space:
        await self.check()
        return Space(capacity=100 * GiB, free=free * GiB)

    monkeypatch.setattr(DirectoryDriver, "space", space)
    assert (await now(rig)).status.fill is Fill.OK
    for left, fill in ((20, Fill.WARNING), (21, Fill.WARNING), (4, Fill.CRITICAL), (50, Fill.OK)):
        seen = free
        free = left
        assert await filling(rig.environment) == (left != 21), seen
        status = (await now(rig)).status
        assert status.fill is fill
        assert bool(status.message) == (fill is not Fill.OK)
        assert not await filling(rig.environment)
    # Both datastores are as full, and each was told of once.
    assert sorted(await told(rig)) == sorted(
        [("datastore.filling", EventLevel.WARNING), ("datastore.filling", EventLevel.ERROR)] * 2
    )


async def test_what_was_promised_is_counted_and_told(
    rig: Rig, fast: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def space(self: DirectoryDriver) -> Space:
        return Space(capacity=10 * GiB, free=GiB)

    monkeypatch.setattr(DirectoryDriver, "space", space)
    await made(rig, "one")
    await made(rig, "two")
    status = (await now(rig)).status
    assert (status.capacity, status.provisioned) == (10 * GiB, 40 * GiB)
    assert 0 < status.used < GiB
    assert "4.0 times the capacity" in (status.message or "")
    assert (await now(rig, "local")).status.provisioned == 0


async def test_one_that_is_away_loses_nothing(rig: Rig, fast: Datastore) -> None:
    volume = await made(rig, "data")
    before = (await now(rig)).status
    path = Path(fast.spec.path)
    away = path.rename(path.with_name("away"))
    path.mkdir()
    assert await filling(rig.environment)
    status = (await now(rig)).status
    assert status.state is DatastoreState.UNAVAILABLE
    assert (status.used, status.provisioned) == (before.used, before.provisioned)
    report = await check_volumes(rig.environment, True)
    assert [f.code for f in report.findings] == ["datastore-unavailable"]
    # A layer that nobody needs is remembered until its file can be removed.
    await update(rig.store, Volume, volume.meta.id, lambda v: volume_status(v, head=""))
    await collect_layers(rig.environment)
    assert [item.meta.id for item in await rig.world.all(Layer)] == [volume.status.head]
    with pytest.raises(UnavailableError, match="mount"):
        await make_layer(rig.environment, volume.status.head)
    path.rmdir()
    away.rename(path)
    assert (await now(rig)).status.state is DatastoreState.READY
    assert list(path.glob("*.qcow2"))
    await collect_layers(rig.environment)
    assert not list(path.glob("*.qcow2"))
    assert not await rig.world.all(Layer)
    assert sorted(type for type, _ in await told(rig)) == [
        "datastore.available",
        "datastore.unavailable",
    ]


async def test_the_next_daemon_puts_right_what_the_last_one_left(rig: Rig, fast: Datastore) -> None:
    half = Path(fast.spec.path) / HALF / "volume-x"
    half.write_bytes(b"x")

    def removing(record: Datastore) -> Datastore:
        status = msgspec.structs.replace(record.status, state=DatastoreState.REMOVING)
        return msgspec.structs.replace(record, status=status)

    await update(rig.store, Datastore, fast.meta.id, removing)
    await open_datastores(rig.environment)
    assert (await now(rig)).status.state is DatastoreState.READY
    assert not half.exists()
