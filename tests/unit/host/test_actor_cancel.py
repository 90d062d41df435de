"""Actors: tasks that are cancelled at any point."""

from __future__ import annotations

import asyncio

from tests.unit.host.acting import FORCE, ask_create, assert_nothing_left, blocked, running
from tests.unit.host.rig import Rig
from undercroft.model.requests import StopRequest
from undercroft.model.task import TaskState
from undercroft.model.vm import VM, ExitReason, Power, VMState
from undercroft.operations.access import SYSTEM


async def test_a_creation_that_is_cancelled_leaves_nothing(rig: Rig) -> None:
    began, _ = blocked(rig, "create_volume")
    task = await ask_create(rig, start=True)
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    await assert_nothing_left(rig)


async def test_a_creation_cancelled_while_it_starts_leaves_the_vm_off(rig: Rig) -> None:
    began, _ = blocked(rig, "start")
    task = await ask_create(rig, start=True)
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert rig.hypervisor.alive == set()


async def test_removal_during_creation(rig: Rig) -> None:
    began, _ = blocked(rig, "start")
    create = await ask_create(rig, start=True)
    await began.wait()
    remove = await rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    assert (await rig.final(create)).status.state is TaskState.CANCELLED
    assert (await rig.final(remove)).status.state is TaskState.SUCCEEDED
    await assert_nothing_left(rig)


async def test_a_removal_cancelled_after_it_has_cut_the_creation_short(rig: Rig) -> None:
    """What was never made cannot come back: there must be no VM without its disk."""
    began = asyncio.Event()

    async def slow_to_go() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)

    rig.hypervisor.hooks["create_volume"] = slow_to_go
    await ask_create(rig)
    await began.wait()
    remove = await rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    await asyncio.sleep(0.01)
    await rig.world.operations.tasks.cancel(SYSTEM, remove.meta.id)
    assert (await rig.final(remove)).status.state is TaskState.SUCCEEDED
    await assert_nothing_left(rig)


async def test_nothing_more_is_taken_on_while_a_removal_waits(rig: Rig) -> None:
    began, _ = blocked(rig, "start")
    await ask_create(rig, start=True)
    await began.wait()
    remove = await rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    seen = set()
    while not (await rig.world.task(remove.meta.id)).status.state.final:
        seen |= {vm.status.state for vm in await rig.world.all(VM)}
        await asyncio.sleep(0)
    assert seen <= {VMState.REMOVING}


async def test_switching_off_what_is_being_made_only_keeps_it_off(rig: Rig) -> None:
    began, go = blocked(rig, "create_volume")
    create = await ask_create(rig, start=True)
    await began.wait()
    stop = await rig.world.operations.vms.stop(SYSTEM, "web1", FORCE)
    go.set()
    assert (await rig.final(create)).status.state is TaskState.SUCCEEDED
    assert (await rig.final(stop)).status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert rig.hypervisor.machines == []


async def test_force_overtakes_a_guest_that_ignores_it(rig: Rig) -> None:
    machine = await running(rig)
    machine.deaf = True
    gentle = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest(timeout=600))
    await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPING)
    forced = await rig.world.operations.vms.stop(SYSTEM, "web1", FORCE)
    assert (await rig.final(gentle)).status.state is TaskState.CANCELLED
    assert (await rig.final(forced)).status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert vm.status.state is VMState.STOPPED
    assert vm.status.last_exit is not None
    assert vm.status.last_exit.reason is ExitReason.FORCED


async def test_a_cancelled_stop_leaves_it_running(rig: Rig) -> None:
    machine = await running(rig)
    machine.deaf = True
    task = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest(timeout=600))
    await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPING)
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.RUNNING, Power.RUNNING)


async def test_a_waiting_task_is_cancelled_when_its_turn_comes(rig: Rig) -> None:
    machine = await running(rig)
    began, go = blocked(rig, "pause")
    first = await rig.world.operations.vms.pause(SYSTEM, "web1")
    second = await rig.world.operations.vms.resume(SYSTEM, "web1")
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, second.meta.id)
    go.set()
    assert (await rig.final(first)).status.state is TaskState.SUCCEEDED
    assert (await rig.final(second)).status.state is TaskState.CANCELLED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.PAUSED, Power.PAUSED)
    assert machine.calls == ["pause"]


async def test_cancelling_twice_does_not_cut_short_how_things_are_put_back(rig: Rig) -> None:
    await rig.final(await ask_create(rig))
    began = asyncio.Event()
    put_back = []

    async def hook() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)
            put_back.append(True)

    rig.hypervisor.hooks["start"] = hook
    task = await rig.world.operations.vms.start(SYSTEM, "web1")
    await began.wait()
    actor = rig.actor(task.spec.object.id)
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    for _ in range(20):
        actor.cancel_task(task.meta.id)
        await asyncio.sleep(0.001)
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    assert put_back == [True]
    assert rig.hypervisor.alive == set()


async def test_what_ends_well_in_spite_of_the_request_has_succeeded(rig: Rig) -> None:
    await running(rig)
    began = asyncio.Event()

    async def stubborn() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return

    rig.hypervisor.hooks["reset"] = stubborn
    task = await rig.world.operations.vms.reset(SYSTEM, "web1")
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED


async def test_half_a_removal_is_not_undone(rig: Rig) -> None:
    await running(rig)
    began, go = blocked(rig, "quit")
    task = await rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    await asyncio.sleep(0.02)
    go.set()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    await assert_nothing_left(rig)


async def test_a_removal_cancelled_in_time_brings_the_vm_back(rig: Rig) -> None:
    await running(rig)
    began, go = blocked(rig, "reset")
    await rig.world.operations.vms.reset(SYSTEM, "web1")
    await began.wait()

    remove = await rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    await rig.world.operations.tasks.cancel(SYSTEM, remove.meta.id)
    go.set()
    assert (await rig.final(remove)).status.state is TaskState.CANCELLED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.RUNNING, Power.RUNNING)
