"""Snapshots that fail, are cancelled, or are cut off: nothing of them stays, and no guest is left
paused or frozen."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import msgspec
import pytest

from tests.unit.host.acting import FORCE, ask_create, blocked, running
from tests.unit.host.rig import Rig, adoptable
from undercroft.host import quiescing, snapshot_files, snapshots
from undercroft.host.forgetting import collect_snapshots, sweep_snapshots
from undercroft.hypervisor.machine import RunState
from undercroft.model.errors import NoSpaceError, QmpError
from undercroft.model.layer import Layer
from undercroft.model.requests import (
    NewDisk,
    RevertRequest,
    SnapshotCreate,
    TemplateCreate,
    VMChange,
)
from undercroft.model.snapshot import Snapshot
from undercroft.model.task import Task, TaskState
from undercroft.model.template import Template
from undercroft.model.units import MiB
from undercroft.model.vm import VM, Forward, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope, snapshot_scope
from undercroft.store.interface import update

MEMORY = SnapshotCreate(name="one", memory=True)


async def ask(rig: Rig, request: SnapshotCreate) -> Task:
    return await rig.world.operations.snapshots.create(SYSTEM, "web1", request)


async def assert_nothing_of_it(rig: Rig) -> None:
    vm = await rig.world.vm("web1")
    assert await rig.world.all(Snapshot) == []
    assert await rig.store.resolve(snapshot_scope(vm.meta.id), "one") is None
    directory = rig.environment.vm_directory(vm.meta.id) / "snapshots"
    assert not directory.exists() or list(directory.iterdir()) == []
    files = {path.stem for path in rig.environment.directory.volumes.iterdir()}
    assert files == {layer.meta.id for layer in await rig.world.all(Layer)}


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "nvram.fd")


async def test_a_full_disk_leaves_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = await running(rig)
    monkeypatch.setattr(snapshots, "copy_state", full)
    done = await rig.final(await ask(rig, MEMORY))
    assert done.status.error is not None
    assert done.status.error.code == NoSpaceError.code
    await assert_nothing_of_it(rig)
    assert machine.run_state is RunState.RUNNING
    monkeypatch.undo()


async def test_saving_memory_is_cancelled_by_who_pulls_the_plug(rig: Rig) -> None:
    await running(rig)
    began, _ = blocked(rig, "save_live")
    task = await ask(rig, MEMORY)
    await began.wait()
    stop = await rig.world.operations.vms.stop(SYSTEM, "web1", FORCE)
    assert (await rig.final(stop)).status.state is TaskState.SUCCEEDED
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    await assert_nothing_of_it(rig)


async def test_saving_memory_can_be_cancelled(rig: Rig) -> None:
    machine = await running(rig)
    began, _ = blocked(rig, "save_live")
    task = await ask(rig, MEMORY)
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    await assert_nothing_of_it(rig)
    assert machine.run_state is RunState.RUNNING
    assert (await rig.world.vm("web1")).status.state is VMState.RUNNING


async def test_branching_off_is_not_left_half_done(rig: Rig) -> None:
    machine = await running(rig)
    began, go = blocked(rig, "branch")
    task = await ask(rig, SnapshotCreate(name="one"))
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    await asyncio.sleep(0.05)
    go.set()
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    await assert_nothing_of_it(rig)
    (volume,) = await rig.world.all(Volume)
    assert machine.nodes == [f"{volume.status.head}.0"]


async def test_disks_that_did_not_branch_off_are_not_said_to_have(rig: Rig) -> None:
    machine = await running(rig)
    (before,) = await rig.world.all(Volume)

    async def refuse() -> None:
        raise QmpError("no")

    rig.hypervisor.hooks["save_live"] = refuse
    done = await rig.final(await ask(rig, MEMORY))
    assert done.status.state is TaskState.FAILED
    await assert_nothing_of_it(rig)
    (volume,) = await rig.world.all(Volume)
    assert volume.status.head == before.status.head
    assert machine.nodes == [f"{volume.status.head}.0"]
    assert machine.run_state is RunState.RUNNING


async def test_memory_goes_with_its_disks_when_the_daemon_ended_in_between(rig: Rig) -> None:
    """A daemon that is told to end lets the guest go on; its memory of later does not go with its
    disks of before."""
    machine = await running(rig)
    began, go = blocked(rig, "publish_state")
    task = await ask(rig, MEMORY)
    await began.wait()
    before = list(machine.nodes)
    adoptable(rig, machine)
    await rig.close()
    assert machine.run_state is RunState.RUNNING  # and writes
    go.set()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    (snapshot,) = await rig.world.all(Snapshot)
    assert machine.nodes != before
    assert [f"{disk.layer}.0" for disk in snapshot.status.disks] == before


async def test_cancelled_while_there_was_no_daemon(rig: Rig) -> None:
    machine = await running(rig)
    began, go = blocked(rig, "save_live")
    task = await ask(rig, MEMORY)
    await began.wait()
    adoptable(rig, machine)
    await rig.close()
    machine.run_state = RunState.PAUSED  # as kill -9 leaves it
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    go.set()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    await assert_nothing_of_it(rig)
    assert machine.run_state is RunState.RUNNING


async def test_what_nobody_finishes_goes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await running(rig)

    async def broken(*_: object) -> None:
        raise QmpError("no")

    began, go = blocked(rig, "branch")
    task = await ask(rig, SnapshotCreate(name="one"))
    await began.wait()
    await collect_snapshots(rig.environment)  # not one that is just being taken
    assert len(await rig.world.all(Snapshot)) == 1
    monkeypatch.setattr(snapshots, "_switch_and_branch", broken)
    monkeypatch.setattr(snapshots, "forget", broken)
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    go.set()
    await rig.final(task)
    assert len(await rig.world.all(Snapshot)) == 1
    monkeypatch.undo()
    vm = await rig.world.vm("web1")
    stray = rig.environment.vm_directory(vm.meta.id) / "snapshots" / "snap-0"
    stray.mkdir(parents=True)
    await sweep_snapshots(rig.environment)
    await assert_nothing_of_it(rig)


async def test_a_cancelled_template_leaves_its_name(rig: Rig) -> None:
    await running(rig)
    began, go = blocked(rig, "branch")
    request = TemplateCreate(name="warm", source="web1")
    task = await rig.world.operations.templates.create(SYSTEM, request)
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    go.set()
    done = await rig.final(task)
    assert done.status.state is TaskState.CANCELLED
    assert await rig.world.all(Template) == []
    assert await rig.store.resolve(scope("template"), "warm") is None
    await assert_nothing_of_it(rig)


@pytest.mark.parametrize("hangs", [1, 2, 3])
async def test_no_guest_stays_frozen(rig: Rig, monkeypatch: pytest.MonkeyPatch, hangs: int) -> None:
    monkeypatch.setattr(quiescing, "RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(quiescing, "PATIENCE", 0.005)
    machine = await running(rig)
    machine.agent.hangs = hangs
    done = await rig.final(await ask(rig, SnapshotCreate(name="one", quiesce=True)))
    assert done.status.state is TaskState.FAILED
    async with asyncio.timeout(10):
        while machine.agent.is_frozen:
            await asyncio.sleep(0.01)
    await assert_nothing_of_it(rig)


async def test_a_guest_that_a_daemon_left_frozen_is_frozen_anew(rig: Rig) -> None:
    machine = await running(rig)
    machine.agent.is_frozen = True
    done = await rig.final(await ask(rig, SnapshotCreate(name="one", quiesce=True)))
    assert done.status.state is TaskState.SUCCEEDED
    assert not machine.agent.is_frozen


async def test_going_back_fails_before_anything_is_lost(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    await running(rig, cpus=2, disks=(NewDisk(size=MiB),))
    operations = rig.world.operations
    await rig.final(await operations.vms.stop(SYSTEM, "web1", FORCE))
    await rig.final(await ask(rig, SnapshotCreate(name="one")))
    (more,) = [one for one in await rig.world.all(Volume) if one.spec.size == MiB]
    await rig.final(await operations.volumes.detach(SYSTEM, more.meta.id))
    await rig.final(await operations.vms.start(SYSTEM, "web1"))
    machine = rig.hypervisor.machine
    await operations.vms.set(SYSTEM, "web1", VMChange(cpus=1))
    volumes = await rig.world.all(Volume)
    layers = len(await rig.world.all(Layer))

    async def no_room(path: Path, size: int, **_: object) -> None:
        raise NoSpaceError("the disk is full")

    monkeypatch.setattr("undercroft.storage.datastores.directory.create_volume", no_room)
    request = RevertRequest(force=True)
    task = await rig.world.operations.snapshots.revert(SYSTEM, "web1", "one", request)
    assert (await rig.final(task)).status.state is TaskState.FAILED
    vm = await rig.world.vm("web1")
    assert machine.run_state is RunState.RUNNING
    assert (vm.status.state, vm.spec.power.value, vm.spec.cpus) == ("running", "running", 1)
    assert len(vm.spec.disks) == 1
    assert await rig.world.all(Volume) == volumes
    files = {path.stem for path in rig.environment.directory.volumes.iterdir()}
    assert files == {layer.meta.id for layer in await rig.world.all(Layer)}
    assert len(files) == layers
    monkeypatch.undo()
    task = await operations.snapshots.revert(SYSTEM, "web1", "one", request)
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert (len(vm.spec.disks), vm.spec.cpus) == (2, 2)
    more = (await operations.volumes.get(SYSTEM, more.meta.id)).record
    assert more.spec.attached == vm.meta.id


async def test_going_back_brings_the_shape_back(rig: Rig) -> None:
    await running(rig, cpus=2)
    await rig.final(await ask(rig, SnapshotCreate(name="one")))
    await rig.world.operations.vms.set(SYSTEM, "web1", VMChange(cpus=1))
    before = await rig.world.vm("web1")
    request = RevertRequest(force=True, start=True)
    task = await rig.world.operations.snapshots.revert(SYSTEM, "web1", "one", request)
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert vm.spec.cpus == 2
    assert vm.meta.generation == before.meta.generation + 1
    assert rig.hypervisor.machine.plan.cpus == 2


async def test_memory_that_was_saved_is_not_saved_again(rig: Rig) -> None:
    """The guest went on since: what it has in memory now does not go with its disks of then."""
    machine = await running(rig)
    began, go = asyncio.Event(), asyncio.Event()
    size = snapshot_files.memory_size

    def slow(directory: Path) -> int:
        loop.call_soon_threadsafe(began.set)
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return size(directory)

    loop = asyncio.get_running_loop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshots, "memory_size", slow)
        task = await ask(rig, MEMORY)
        await began.wait()
        nodes = list(machine.nodes)
        adoptable(rig, machine)
        go.set()
        await rig.kill()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert machine.calls.count("save_live") == 1
    assert machine.nodes == nodes
    assert machine.run_state is RunState.RUNNING
    (snapshot,) = await rig.world.all(Snapshot)
    assert snapshot.status.memory > 0


async def test_what_belongs_to_a_vm_whose_disks_are_only_read_is_kept(rig: Rig) -> None:
    await rig.final(await ask_create(rig))

    def only_read(vm: VM) -> VM:
        disks = (msgspec.structs.replace(vm.spec.disks[0], read_only=True),)
        return msgspec.structs.replace(vm, spec=msgspec.structs.replace(vm.spec, disks=disks))

    vm = await rig.world.vm("web1")
    await update(rig.store, VM, vm.meta.id, only_read)
    (rig.environment.vm_directory(vm.meta.id) / "nvram.fd").write_bytes(b"settings")
    await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert (await rig.final(await ask(rig, MEMORY))).status.state is TaskState.SUCCEEDED
    (snapshot,) = await rig.world.all(Snapshot)
    kept = rig.environment.snapshot_directory(snapshot) / "nvram.fd"
    assert kept.read_bytes() == b"settings"


async def test_a_guest_that_goes_back_is_told(rig: Rig) -> None:
    """By its generation id: what it has used up since must not be used again."""
    machine = await running(rig)
    operations = rig.world.operations
    await rig.final(await ask(rig, MEMORY))
    await rig.final(await operations.vms.suspend(SYSTEM, "web1"))
    await rig.final(await operations.vms.start(SYSTEM, "web1"))
    resumed = rig.hypervisor.machine
    assert resumed.plan.incoming is not None
    assert resumed.plan.vmgenid == machine.plan.vmgenid
    known = {machine.plan.vmgenid}
    for number in (2, 3):
        request = RevertRequest(force=True)
        task = await operations.snapshots.revert(SYSTEM, "web1", "one", request)
        assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
        assert rig.hypervisor.machine.plan.incoming is not None
        known.add(rig.hypervisor.machine.plan.vmgenid)
        assert len(known) == number
    await rig.final(await operations.vms.restart(SYSTEM, "web1", FORCE))
    assert rig.hypervisor.machine.plan.incoming is None
    assert rig.hypervisor.machine.plan.vmgenid in known - {machine.plan.vmgenid}


async def test_what_leads_into_a_guest_that_goes_back_is_what_leads_there_now(rig: Rig) -> None:
    """Who has its old port by now keeps it."""
    await running(rig)
    operations = rig.world.operations
    await rig.final(await ask(rig, MEMORY))
    change = VMChange(forwards=(Forward(guest_port=1, host_port=8081),))
    await operations.vms.set(SYSTEM, "web1", change)
    task = await operations.snapshots.revert(SYSTEM, "web1", "one", RevertRequest(force=True))
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    plan = rig.hypervisor.machine.plan
    assert plan.incoming is not None
    assert [forward.host_port for port in plan.ports for forward in port.forwards] == [8081]


async def test_a_guest_that_somebody_else_has_paused_stays_so(rig: Rig) -> None:
    """As who sees that there is no room for what an NVMe disk is written."""
    machine = await running(rig)
    began, go = blocked(rig, "branch")
    task = await ask(rig, SnapshotCreate(name="one"))
    await began.wait()
    await machine.pause()
    go.set()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert machine.run_state is RunState.PAUSED
    assert (await rig.world.vm("web1")).status.state is VMState.PAUSED


async def test_a_paused_guest_does_not_go_on_between_its_disks_and_its_memory(rig: Rig) -> None:
    machine = await running(rig)
    await rig.final(await rig.world.operations.vms.pause(SYSTEM, "web1"))
    machine.calls.clear()
    assert (await rig.final(await ask(rig, MEMORY))).status.state is TaskState.SUCCEEDED
    assert machine.calls == ["make_savable", "branch", "save_memory"]
