"""Changing, renaming and removing VMs."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.unit.operations.world import HOST, World
from undercroft.model.errors import (
    AlreadyExistsError,
    InvalidError,
    StaleError,
    UndercroftError,
    UnsupportedError,
    WrongStateError,
)
from undercroft.model.event import Event
from undercroft.model.image import ImageDefaults
from undercroft.model.requests import VMChange, VMCreate
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import VM, Display, Forward, Power, RestartPolicy, VMState
from undercroft.model.volume import Volume
from undercroft.operations import vm_create
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.operations.vm_change import removal_releases
from undercroft.store.interface import Claim, Transaction, Versioned, update


async def change(world: World, ref: str = "web1", if_match: int | None = None, **values: Any) -> VM:
    written = await world.operations.vms.set(SYSTEM, ref, VMChange(**values), if_match)
    assert await world.operations.vms.get(SYSTEM, written.record.meta.id) == written
    return written.record


async def seen(world: World, ref: str = "web1") -> Versioned[VM]:
    return await world.operations.vms.get(SYSTEM, ref)


async def test_values_and_generation(world: World) -> None:
    await world.created("web1")
    vm = await change(
        world,
        cpus=4,
        memory=GiB,
        display=Display.NONE,
        restart=RestartPolicy.NEVER,
        stop_timeout=5.0,
        labels={"a": "b"},
        cpu_model="max",
    )
    assert (vm.spec.cpus, vm.spec.memory, vm.spec.display) == (4, GiB, Display.NONE)
    assert (vm.spec.restart, vm.spec.stop_timeout, vm.spec.cpu_model) == ("never", 5.0, "max")
    assert vm.meta.labels == {"a": "b"}
    assert vm.meta.generation == 2
    events = [e for e in await world.all(Event) if e.type == "vm.changed"]
    assert [e.message for e in events] == [
        "vm web1 was changed: cpu_model, cpus, display, labels, memory, restart, stop_timeout"
    ]


async def test_nothing_to_change_writes_nothing(world: World) -> None:
    await world.created("web1")
    revision = await world.store.revision()
    await change(world)
    assert await world.store.revision() == revision


async def test_labels_can_be_emptied(world: World) -> None:
    await world.created("web1", labels={"a": "b"})
    assert (await change(world, cpus=2)).meta.labels == {"a": "b"}
    assert (await change(world, labels={})).meta.labels == {}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"cpus": 0}, InvalidError),
        ({"memory": 1}, InvalidError),
        ({"name": "Bad Name"}, InvalidError),
        ({"labels": {"": ""}}, InvalidError),
        ({"stop_timeout": float("nan")}, InvalidError),
        ({"kernel_arguments": "quiet"}, InvalidError),
        ({"cpu_model": "a b"}, InvalidError),
        ({"forwards": (Forward(guest_port=0),)}, InvalidError),
        (
            {"forwards": (Forward(guest_port=1, host_port=9), Forward(guest_port=2, host_port=9))},
            InvalidError,
        ),
        ({"forwards": (Forward(guest_port=1, host_address="nowhere.invalid"),)}, InvalidError),
    ],
)
async def test_a_refusal_changes_nothing(
    world: World, values: dict[str, Any], kind: type[UndercroftError]
) -> None:
    before = await world.created("web1")
    with pytest.raises(kind):
        await change(world, **values)
    assert await world.vm("web1") == before


async def test_the_board_limits_what_can_be_changed(world: World) -> None:
    defaults = ImageDefaults(machine="microvm", firmware="kernel")
    await world.image("tiny", defaults=defaults, disk=None, virtual_size=0, kernel="kernel")
    await world.created("web1", image="tiny")
    with pytest.raises(UnsupportedError):
        await change(world, display=Display.STD)
    assert (await change(world, kernel_arguments="quiet")).spec.kernel_arguments == "quiet"
    assert (await change(world, kernel_arguments="")).spec.kernel_arguments == ""


async def test_if_match(world: World) -> None:
    await world.created("web1")
    old = (await seen(world)).revision
    await change(world, if_match=old, cpus=2)
    with pytest.raises(StaleError) as caught:
        await change(world, if_match=old, cpus=3)
    assert caught.value.object == "vm web1"
    assert caught.value.data["expected"] == old
    assert (await world.vm("web1")).spec.cpus == 2


async def test_of_many_with_the_same_if_match_one_wins(world: World) -> None:
    await world.created("web1")
    old = (await seen(world)).revision
    outcomes = await asyncio.gather(
        *(change(world, if_match=old, cpus=n) for n in range(2, 22)), return_exceptions=True
    )
    assert sum(isinstance(one, VM) for one in outcomes) == 1
    assert sum(isinstance(one, StaleError) for one in outcomes) == 19


async def test_changes_at_once_are_all_kept(world: World) -> None:
    await world.created("web1")
    wishes: list[dict[str, Any]] = [
        {"cpus": 3},
        {"memory": 768 * MiB},
        {"stop_timeout": 7.0},
        {"labels": {"x": "y"}},
        {"cpu_model": "max"},
    ]
    await asyncio.gather(  # what each of them finds afterwards, the next one may have changed
        *(world.operations.vms.set(SYSTEM, "web1", VMChange(**wish)) for wish in wishes)
    )
    vm = await world.vm("web1")
    assert (vm.spec.cpus, vm.spec.memory, vm.spec.stop_timeout) == (3, 768 * MiB, 7.0)
    assert (vm.meta.labels, vm.spec.cpu_model) == ({"x": "y"}, "max")
    assert vm.meta.generation == 6


async def test_a_name_changes_hands(world: World) -> None:
    first = await world.created("web1", disk=GiB)
    await change(world, name="old")
    assert (await world.vm("old")).meta.id == first.meta.id
    second = await world.created("web1", disk=GiB)
    assert {v.meta.name for v in await world.all(Volume)} == {"old-boot", "web1-boot"}
    assert second.meta.id != first.meta.id
    await world.check_invariants()


async def test_a_taken_name_is_refused_and_nothing_is_half_renamed(world: World) -> None:
    await world.created("web1", disk=GiB)
    await world.created("web2", disk=GiB)
    with pytest.raises(AlreadyExistsError, match="web2"):
        await change(world, name="web2")
    await world.check_invariants()


async def test_two_renames_cross(world: World) -> None:
    await world.created("web1", disk=GiB)
    await world.created("web2", disk=GiB)
    outcomes = await asyncio.gather(
        change(world, "web1", name="shared"),
        change(world, "web2", name="shared"),
        return_exceptions=True,
    )
    assert sorted(type(one).__name__ for one in outcomes) == ["AlreadyExistsError", "VM"]
    await world.check_invariants()


async def test_renaming_to_the_own_name(world: World) -> None:
    await world.created("web1", disk=GiB)
    await change(world, name="web1")
    await world.check_invariants()


async def test_what_is_being_made_keeps_its_name(world: World) -> None:
    await world.operations.vms.create(SYSTEM, VMCreate(name="web1", disk=GiB))
    with pytest.raises(WrongStateError):
        await change(world, name="web2")
    assert (await change(world, cpus=2)).spec.cpus == 2


async def test_a_volume_written_to_meanwhile_does_not_fail_a_rename(world: World) -> None:
    """Its allocated size is measured now and then: that is no change of the VM."""
    vm = await world.created("web1", disk=GiB)
    get = world.store.get
    touched = False

    async def meddling(kind: Any, id: str) -> Any:
        nonlocal touched
        found = await get(kind, id)
        if kind is Volume and not touched:
            import msgspec

            touched = True
            await update(
                world.store,
                Volume,
                id,
                lambda v: msgspec.structs.replace(
                    v, status=msgspec.structs.replace(v.status, allocated=123)
                ),
            )
        return found

    world.store.get = meddling  # type: ignore[method-assign]
    revision = (await seen(world)).revision
    await change(world, if_match=revision, name="web2")
    assert touched
    assert (await world.vm("web2")).meta.id == vm.meta.id
    await world.check_invariants()


async def ports_of(world: World) -> dict[int, int]:
    vm = await world.vm("web1")
    return {f.guest_port: f.host_port for f in vm.spec.ports[0].forwards}


async def test_forwards_claim_and_release(world: World) -> None:
    vm = await world.created("web1", forwards=(Forward(guest_port=80, host_port=8080),))
    await change(world, forwards=(Forward(guest_port=80, host_port=8081), Forward(guest_port=443)))
    assert await world.store.resolve(f"port/{HOST}", "tcp/8080") is None
    assert await world.store.resolve(f"port/{HOST}", "tcp/8081") == vm.meta.id
    chosen = (await ports_of(world))[443]
    await change(world, forwards=(Forward(guest_port=443),))
    assert await ports_of(world) == {443: chosen}
    assert await world.store.resolve(f"port/{HOST}", "tcp/8081") is None
    await change(world, forwards=())
    assert await world.store.resolve(f"port/{HOST}", f"tcp/{chosen}") is None
    await world.check_invariants()


async def test_two_forwards_of_one_guest_port_do_not_share_a_host_port(world: World) -> None:
    await world.created("web1", forwards=(Forward(guest_port=80, host_port=8080),))
    await change(world, forwards=(Forward(guest_port=80), Forward(guest_port=80)))
    vm = await world.vm("web1")
    ports = [f.host_port for f in vm.spec.ports[0].forwards]
    assert len(set(ports)) == 2
    assert 8080 in ports
    await world.check_invariants()


async def test_a_kept_port_that_another_forward_takes_over(world: World) -> None:
    await world.created("web1", forwards=(Forward(guest_port=80, host_port=8080),))
    await change(world, forwards=(Forward(guest_port=80), Forward(guest_port=81, host_port=8080)))
    ports = await ports_of(world)
    assert ports[81] == 8080
    assert ports[80] != 8080
    await world.check_invariants()


async def test_a_port_of_another_vm_is_refused(world: World) -> None:
    await world.created("web1")
    await world.created("web2", forwards=(Forward(guest_port=80, host_port=8080),))
    with pytest.raises(AlreadyExistsError, match="port 8080"):
        await change(world, forwards=(Forward(guest_port=80, host_port=8080),))
    await world.check_invariants()


async def test_a_chosen_port_taken_meanwhile_is_chosen_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first_taken(*_: object) -> int:
        return next(numbers)

    await world.created("web1")
    numbers = iter([20001, 20002])
    monkeypatch.setattr(vm_create, "_free_port", first_taken)
    await world.store.transact(
        Transaction(claims=[Claim(f"port/{HOST}", "tcp/20001", "vm-0000000000000000")])
    )
    await change(world, forwards=(Forward(guest_port=80),))
    assert await ports_of(world) == {80: 20002}


async def test_no_forwards_without_an_adapter(world: World) -> None:
    await world.created("web1", ports=())
    with pytest.raises(InvalidError):
        await change(world, forwards=(Forward(guest_port=1),))


# -- removing -------------------------------------------------------------------------------


async def test_remove_marks_and_queues(world: World) -> None:
    await world.created("web1", disk=GiB)
    task = await world.operations.vms.remove(SYSTEM, "web1")
    vm = await world.vm("web1")
    assert vm.status.state is VMState.REMOVING
    assert vm.tasks == (task.meta.id,)
    again = await world.operations.vms.remove(SYSTEM, "web1")
    assert again.meta.id == task.meta.id
    with pytest.raises(WrongStateError):
        await world.operations.vms.start(SYSTEM, "web1")
    with pytest.raises(WrongStateError):
        await change(world, cpus=2)
    with pytest.raises(AlreadyExistsError):  # the name is free once it is gone
        await world.created("web1")
    await world.check_invariants()


@pytest.mark.parametrize(
    ("state", "power"),
    [
        (VMState.RUNNING, Power.RUNNING),
        (VMState.PAUSED, Power.PAUSED),
        (VMState.SUSPENDED, Power.SUSPENDED),
        (VMState.STOPPED, Power.RUNNING),
        (VMState.STOPPING, Power.STOPPED),
    ],
)
async def test_what_is_on_is_removed_by_force_only(
    world: World, state: VMState, power: Power
) -> None:
    await world.created("web1")
    before = await world.put("web1", state, power)
    with pytest.raises(WrongStateError) as caught:
        await world.operations.vms.remove(SYSTEM, "web1")
    assert "rm --force web1" in (caught.value.action or "")
    assert await world.vm("web1") == before
    await world.operations.vms.remove(SYSTEM, "web1", force=True)
    assert (await world.vm("web1")).spec.power is Power.STOPPED


async def test_removal_cancels_whatever_waits_even_the_making(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="web1", start=True))
    started = await world.operations.vms.pause(SYSTEM, "web1")
    await world.operations.vms.remove(SYSTEM, "web1", force=True)
    for id in (task.meta.id, started.meta.id):
        assert (await world.task(id)).spec.cancel
    await world.check_invariants()


async def test_removal_gives_every_name_back(world: World) -> None:
    vm = await world.created("web1", disk=GiB, forwards=(Forward(guest_port=1, host_port=8080),))
    volumes = await world.all(Volume)
    releases = removal_releases(vm, volumes)
    await world.store.transact(Transaction(releases=releases))
    for where, name in (
        (scope("vm"), "web1"),
        (scope("volume"), "web1-boot"),
        (f"port/{HOST}", "tcp/8080"),
    ):
        assert await world.store.resolve(where, name) is None
