"""Asking for snapshots: what is written down, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.operations.world import World
from undercroft.model.base import Meta
from undercroft.model.errors import (
    AlreadyExistsError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    WrongStateError,
)
from undercroft.model.names import new_id
from undercroft.model.requests import RevertRequest, SnapshotCreate, TemplateCreate
from undercroft.model.snapshot import Snapshot, SnapshotSpec, SnapshotState, SnapshotStatus
from undercroft.model.vm import VM, Power
from undercroft.operations.access import SYSTEM, VIEW, Caller
from undercroft.operations.context import snapshot_scope
from undercroft.operations.snapshots import shape
from undercroft.store.interface import Claim, Put, Transaction


async def taken(world: World, vm: VM, name: str, **status: object) -> Snapshot:
    """A snapshot that the host has taken."""
    status.setdefault("state", SnapshotState.READY)
    status.setdefault("shape", vm.spec)
    snapshot = Snapshot(
        meta=Meta(id=new_id("snapshot"), name=name, created=world.context.clock()),
        spec=SnapshotSpec(vm=vm.meta.id),
        status=msgspec.structs.replace(SnapshotStatus(), **status),
    )
    claim = Claim(snapshot_scope(vm.meta.id), name, snapshot.meta.id)
    await world.context.store.transact(Transaction(claims=[claim], puts=[Put(snapshot)]))
    return snapshot


async def test_memory_and_quiescence_do_not_go_together(world: World) -> None:
    await world.created("web1")
    request = SnapshotCreate(memory=True, quiesce=True)
    with pytest.raises(InvalidError, match="not both"):
        await world.operations.snapshots.create(SYSTEM, "web1", request)
    template = TemplateCreate(name="warm", source="web1", memory=True, quiesce=True)
    with pytest.raises(InvalidError, match="not both"):
        await world.operations.templates.create(SYSTEM, template)


async def test_a_name_is_chosen_where_none_is_given(world: World) -> None:
    vm = await world.created("web1")
    await taken(world, vm, "snap1")
    task = await world.operations.snapshots.create(SYSTEM, "web1", SnapshotCreate(memory=True))
    assert task.spec.arguments["name"] == "snap2"
    assert task.spec.arguments["spec"]["memory"] is True
    assert (await world.vm("web1")).tasks == (task.meta.id,)


async def test_names_are_those_of_one_vm(world: World) -> None:
    one, two = await world.created("one"), await world.created("two")
    await taken(world, one, "before")
    kept = await taken(world, two, "before")
    snapshots = world.operations.snapshots
    assert (await snapshots.get(SYSTEM, "two", "before")).record == kept
    with pytest.raises(AlreadyExistsError, match="vm one has a snapshot before already"):
        await snapshots.create(SYSTEM, "one", SnapshotCreate(name="before"))
    with pytest.raises(NotFoundError, match="vm one has no snapshot after"):
        await snapshots.get(SYSTEM, "one", "after")
    with pytest.raises(NotFoundError):  # not by the id of another's either
        await snapshots.get(SYSTEM, "one", kept.meta.id)
    assert [i.record for i in (await snapshots.list(SYSTEM, "two")).items] == [kept]


async def test_nonsense(world: World) -> None:
    await world.created("web1")
    create = world.operations.snapshots.create
    with pytest.raises(InvalidError):
        await create(SYSTEM, "web1", SnapshotCreate(name="Not A Name"))
    with pytest.raises(InvalidError):
        await create(SYSTEM, "web1", SnapshotCreate(description="x" * 2000))
    with pytest.raises(NotFoundError):
        await create(SYSTEM, "web2", SnapshotCreate())
    with pytest.raises(ForbiddenError):
        await create(Caller("guest", VIEW), "web1", SnapshotCreate())


async def test_a_running_vm_goes_back_only_by_force(world: World) -> None:
    vm = await world.created("web1", start=True)
    await taken(world, vm, "before")
    revert = world.operations.snapshots.revert
    with pytest.raises(WrongStateError, match="would switch it off"):
        await revert(SYSTEM, "web1", "before", RevertRequest())
    await revert(SYSTEM, "web1", "before", RevertRequest(force=True))
    assert (await world.vm("web1")).spec.power is Power.STOPPED


@pytest.mark.parametrize(
    ("memory", "running", "start", "power"),
    [
        (0, True, False, Power.STOPPED),
        (0, False, True, Power.RUNNING),
        (4096, True, False, Power.RUNNING),
        (4096, False, False, Power.STOPPED),
    ],
)
async def test_what_it_is_afterwards(
    world: World, memory: int, running: bool, start: bool, power: Power
) -> None:
    vm = await world.created("web1", cpus=2)
    old = msgspec.structs.replace(vm.spec, cpus=1, stop_timeout=5.0)
    await taken(world, vm, "before", memory=memory, running=running, shape=old)
    await world.operations.snapshots.revert(SYSTEM, "web1", "before", RevertRequest(start=start))
    spec = (await world.vm("web1")).spec
    # Its shape changes with its disks, and not if that does not come about.
    assert (spec.power, spec.cpus) == (power, 2)
    shaped = msgspec.structs.replace(spec, **shape(old))
    assert (shaped.cpus, shaped.stop_timeout) == (1, vm.spec.stop_timeout)


async def test_one_that_is_being_taken_can_wait(world: World) -> None:
    vm = await world.created("web1")
    await taken(world, vm, "now", state=SnapshotState.PENDING)
    with pytest.raises(WrongStateError, match="just being taken"):
        await world.operations.snapshots.revert(SYSTEM, "web1", "now", RevertRequest())
    with pytest.raises(WrongStateError, match="just being taken"):
        await world.operations.snapshots.remove(SYSTEM, "web1", "now")
