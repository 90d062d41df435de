"""Putting layers together: it waits for nobody who wants the VM, and no guest goes on before it is
written down where it writes to."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.host.acting import FORCE, blocked, running
from tests.unit.host.rig import FakeMachine, Rig, adoptable
from undercroft.hypervisor.machine import RunState
from undercroft.model.errors import QmpError
from undercroft.model.layer import Layer
from undercroft.model.requests import SnapshotCreate
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task, TaskState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM


async def snapped(rig: Rig, *, written: int = 0) -> FakeMachine:
    """A VM that runs and has a snapshot, and since then has written so many bytes."""
    machine = await running(rig)
    request = SnapshotCreate(name="one")
    await rig.final(await rig.world.operations.snapshots.create(SYSTEM, "web1", request))
    if written:
        (await rig.disk(await rig.world.vm("web1"))).write_bytes(b"x" * written)
    return machine


async def remove(rig: Rig) -> Task:
    return await rig.world.operations.snapshots.remove(SYSTEM, "web1", "one")


@pytest.mark.parametrize(("written", "call"), [(0, "begin_fold"), (1 << 16, "absorb")])
async def test_what_costs_less_is_copied(rig: Rig, written: int, call: str) -> None:
    machine = await snapped(rig, written=written)
    assert (await rig.final(await remove(rig))).status.state is TaskState.SUCCEEDED
    assert call in machine.calls
    assert len({"begin_fold", "absorb"} & set(machine.calls)) == 1
    (layer,) = await rig.world.all(Layer)
    (volume,) = await rig.world.all(Volume)
    assert volume.status.head == layer.meta.id
    assert machine.run_state is RunState.RUNNING


@pytest.mark.parametrize(("written", "call"), [(0, "begin_fold"), (1 << 16, "absorb")])
async def test_who_pulls_the_plug_does_not_wait(rig: Rig, written: int, call: str) -> None:
    machine = await snapped(rig, written=written)
    began, _ = blocked(rig, call)
    task = await remove(rig)
    await began.wait()
    stop = await rig.world.operations.vms.stop(SYSTEM, "web1", FORCE)
    assert (await rig.final(stop)).status.state is TaskState.SUCCEEDED
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert machine.over
    assert await rig.world.all(Snapshot) == []


async def test_another_daemon_is_told_not_to_go_on_with_it(rig: Rig) -> None:
    machine = await snapped(rig)
    began, _ = blocked(rig, "begin_fold")
    task = await remove(rig)
    await began.wait()
    adoptable(rig, machine)
    await rig.close()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert machine.calls.count("begin_fold") == 1
    assert "give_up_merging" in machine.calls


async def test_no_guest_goes_on_before_it_is_known_where_it_writes(rig: Rig) -> None:
    """The daemon dies when QEMU writes to the lower layer, and the record still says the upper."""
    machine = await snapped(rig)

    async def dies() -> None:
        rig.hypervisor.hooks.clear()
        died.set()
        await asyncio.Event().wait()

    died = asyncio.Event()
    rig.hypervisor.hooks["end_fold"] = dies
    task = await remove(rig)
    await died.wait()
    adoptable(rig, machine)
    heads: list[str] = []

    async def resumes() -> None:
        (volume,) = await rig.world.all(Volume)
        heads.append(f"{volume.status.head}.0")

    rig.hypervisor.hooks["resume"] = resumes
    await rig.kill()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert machine.run_state is RunState.RUNNING
    assert heads == machine.nodes
    assert len(await rig.world.all(Layer)) == 1


async def test_what_could_not_be_ended_in_order_is_written_down_all_the_same(rig: Rig) -> None:
    machine = await snapped(rig)

    async def fails() -> None:
        raise QmpError("no")

    rig.hypervisor.hooks["end_fold"] = fails
    assert (await rig.final(await remove(rig))).status.state is TaskState.SUCCEEDED
    (volume,) = await rig.world.all(Volume)
    assert machine.nodes == [f"{volume.status.head}.0"]
    assert machine.run_state is RunState.RUNNING
    assert len(await rig.world.all(Layer)) == 1
