"""Actors: tasks that succeed or fail, saved state, and what is watched meanwhile."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from tests.unit.host.acting import FORCE, ask_create, assert_nothing_left, blocked, events, running
from tests.unit.host.rig import FakeMachine, Rig, refused
from undercroft.host import outcome
from undercroft.hypervisor.machine import MachineEvent, RunState
from undercroft.hypervisor.plan import DiskFormat, PlanDisk
from undercroft.model.errors import NoSpaceError, ProgramError, QmpError
from undercroft.model.event import Event
from undercroft.model.requests import StopRequest, VMChange
from undercroft.model.task import TaskState
from undercroft.model.vm import VM, DiskBus, Power, VMState
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import new_task
from undercroft.store.interface import Put, Transaction, update

# -- success -----------------------------------------------------------------------------------


async def test_create_and_start(rig: Rig) -> None:
    task = await rig.final(await ask_create(rig, start=True))
    assert task.status.state is TaskState.SUCCEEDED
    assert task.status.result["vm"] == task.spec.object.id
    vm = await rig.world.vm("web1")
    assert vm.status.state is VMState.RUNNING
    assert vm.status.instance == rig.hypervisor.machine.instance
    assert vm.tasks == ()
    assert (await rig.disk(vm)).exists()
    assert "vm.started" in await events(rig)
    await rig.world.check_invariants()


async def test_a_round_through_all_verbs(rig: Rig) -> None:
    await running(rig)
    vms = rig.world.operations.vms
    for call, state, power in (
        (vms.pause(SYSTEM, "web1"), VMState.PAUSED, Power.PAUSED),
        (vms.resume(SYSTEM, "web1"), VMState.RUNNING, Power.RUNNING),
        (vms.suspend(SYSTEM, "web1"), VMState.SUSPENDED, Power.SUSPENDED),
        (vms.start(SYSTEM, "web1"), VMState.RUNNING, Power.RUNNING),
        (vms.reset(SYSTEM, "web1"), VMState.RUNNING, Power.RUNNING),
        (vms.restart(SYSTEM, "web1", StopRequest()), VMState.RUNNING, Power.RUNNING),
        (vms.stop(SYSTEM, "web1", StopRequest()), VMState.STOPPED, Power.STOPPED),
    ):
        task = await rig.final(await call)
        assert task.status.state is TaskState.SUCCEEDED, task
        vm = await rig.world.vm("web1")
        assert (vm.status.state, vm.spec.power) == (state, power)
        assert (vm.status.instance is not None) == vm.status.state.alive
        assert not rig.environment.suspended_path(vm.meta.id).exists() or (
            state is VMState.SUSPENDED
        )
    assert len(rig.hypervisor.machines) == 3
    await rig.final(await vms.remove(SYSTEM, "web1"))
    await assert_nothing_left(rig)


async def test_tasks_run_one_at_a_time_in_their_order(rig: Rig) -> None:
    machine = await running(rig)
    began, go = blocked(rig, "pause")
    vms = rig.world.operations.vms
    tasks = [
        await vms.pause(SYSTEM, "web1"),
        await vms.resume(SYSTEM, "web1"),
        await vms.reset(SYSTEM, "web1"),
    ]
    await began.wait()
    await asyncio.sleep(0.02)
    assert machine.calls == ["pause"]
    go.set()
    for task in tasks:
        await rig.final(task)
    assert machine.calls == ["pause", "resume", "reset"]


async def test_a_wake_is_never_lost(rig: Rig) -> None:
    machine = await running(rig)
    vms = rig.world.operations.vms
    for n in range(30):
        await rig.final(await (vms.pause if n % 2 == 0 else vms.resume)(SYSTEM, "web1"))
    assert machine.calls == ["pause", "resume"] * 15


# -- failure -----------------------------------------------------------------------------------


async def test_a_vm_that_cannot_be_made_leaves_nothing(rig: Rig) -> None:
    async def fail() -> None:
        raise ProgramError("qemu-img failed")

    rig.hypervisor.hooks["create_volume"] = fail
    task = await rig.final(await ask_create(rig, start=True))
    assert task.status.state is TaskState.FAILED
    assert task.status.error is not None
    assert task.status.error.code == "program"
    await assert_nothing_left(rig)
    assert (await events(rig))[-1] == "vm.create.failed"


async def test_what_waits_for_a_vm_that_cannot_be_made_is_cancelled(rig: Rig) -> None:
    began, go = blocked(rig, "create_volume")
    create = await ask_create(rig)
    start = await rig.world.operations.vms.start(SYSTEM, "web1")
    await began.wait()

    async def fail() -> None:
        raise OSError(5, "Input/output error")

    rig.hypervisor.hooks["create_volume"] = fail
    await rig.again()  # the daemon is restarted, and the disk fails now
    assert (await rig.final(create)).status.state is TaskState.FAILED
    assert (await rig.final(start)).status.state is TaskState.CANCELLED
    go.set()
    await assert_nothing_left(rig)


async def test_an_unexpected_fault_is_told_as_one_of_ours(rig: Rig) -> None:
    machine = await running(rig)

    async def fail() -> None:
        raise ValueError("odd")

    rig.hypervisor.hooks["pause"] = fail
    task = await rig.final(await rig.world.operations.vms.pause(SYSTEM, "web1"))
    assert task.status.error is not None
    assert task.status.error.code == "internal"
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.RUNNING, Power.RUNNING)
    assert machine.run_state is RunState.RUNNING


async def test_one_that_was_made_but_does_not_start_stays(rig: Rig) -> None:
    rig.hypervisor.failures = [refused()]
    task = await rig.final(await ask_create(rig, start=True))
    assert task.status.state is TaskState.FAILED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert "no such board" in (vm.status.message or "")
    await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert (await rig.world.vm("web1")).status.state is VMState.RUNNING


async def test_a_failed_start_is_not_tried_again_by_itself(rig: Rig) -> None:
    await rig.final(await ask_create(rig))
    rig.hypervisor.failures = [refused()]
    task = await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert task.status.state is TaskState.FAILED
    await asyncio.sleep(0.05)
    assert rig.hypervisor.machines == []
    assert (await rig.world.vm("web1")).spec.power is Power.STOPPED


async def test_a_verb_that_nobody_knows(rig: Rig) -> None:
    await running(rig)
    vm = await rig.world.vm("web1")
    odd = new_task(rig.world.context, "vm.levitate", vm, "me")
    await rig.store.transact(Transaction(puts=[Put(odd)]))
    await update(rig.store, VM, vm.meta.id, lambda v: _with(v, odd.meta.id))
    assert (await rig.final(odd)).status.state is TaskState.FAILED
    await rig.state("web1", VMState.RUNNING)


async def test_a_task_that_is_gone_is_dropped(rig: Rig) -> None:
    await running(rig)
    vm = await rig.world.vm("web1")
    await update(rig.store, VM, vm.meta.id, lambda v: _with(v, "task-0000000000000000"))
    await rig.state("web1", VMState.RUNNING)
    assert (await rig.world.vm("web1")).tasks == ()


def _with(vm: VM, task: str) -> VM:
    return msgspec.structs.replace(vm, tasks=(*vm.tasks, task))


async def test_an_outcome_is_written_once_there_is_room_and_done_once(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await running(rig)
    monkeypatch.setattr(outcome, "RETRY_INTERVAL", 0.01)
    transact = rig.store.transact
    refusals = 0

    async def full(transaction: Transaction) -> int:
        nonlocal refusals
        if "reset" in machine.calls and refusals < 5:
            refusals += 1
            raise NoSpaceError("disk full")
        return await transact(transaction)

    monkeypatch.setattr(rig.store, "transact", full)
    task = await rig.final(await rig.world.operations.vms.reset(SYSTEM, "web1"))
    assert task.status.state is TaskState.SUCCEEDED
    assert refusals == 5
    assert machine.calls == ["reset"]


async def test_data_that_cannot_be_written_does_not_stop_the_queue(rig: Rig) -> None:
    await running(rig)

    async def fail() -> None:
        raise QmpError("no", path=rig.environment.data, what={1: object()})

    rig.hypervisor.hooks["pause"] = fail
    task = await rig.final(await rig.world.operations.vms.pause(SYSTEM, "web1"))
    assert task.status.error is not None
    assert task.status.error.data["path"] == str(rig.environment.data)


# -- saved state -------------------------------------------------------------------------------


async def test_a_gentle_stop_does_not_throw_saved_state_away(rig: Rig) -> None:
    await running(rig)
    began, go = blocked(rig, "suspend")
    suspend = await rig.world.operations.vms.suspend(SYSTEM, "web1")
    await began.wait()
    stop = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest())
    go.set()
    assert (await rig.final(suspend)).status.state is TaskState.SUCCEEDED
    refusal = await rig.final(stop)
    assert refusal.status.error is not None
    assert refusal.status.error.code == "wrong-state"
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.SUSPENDED, Power.SUSPENDED)
    assert rig.environment.suspended_path(vm.meta.id).exists()
    forced = await rig.final(await rig.world.operations.vms.stop(SYSTEM, "web1", FORCE))
    assert forced.status.result == {"reason": "forced"}
    assert not rig.environment.suspended_path(vm.meta.id).exists()


async def test_saved_state_that_does_not_load_is_kept(rig: Rig) -> None:
    await running(rig)
    await rig.final(await rig.world.operations.vms.suspend(SYSTEM, "web1"))
    rig.hypervisor.failures = [refused("out of memory")]
    task = await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert task.status.state is TaskState.FAILED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.SUSPENDED, Power.SUSPENDED)
    await rig.final(await rig.world.operations.vms.resume(SYSTEM, "web1"))
    assert (await rig.world.vm("web1")).status.state is VMState.RUNNING
    assert rig.hypervisor.machine.plan.incoming is not None


async def test_saved_state_beside_a_running_machine_is_stale(rig: Rig) -> None:
    """To load it once the guest has gone on would destroy what is on its disks."""
    machine = await running(rig)
    saved = rig.environment.suspended_path(machine.plan.id)
    saved.write_bytes(b"old")
    rig.hypervisor.adoptable[machine.plan.id] = machine
    directory = rig.environment.run_directory(machine.plan.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qmp.sock").touch()
    await rig.again()
    assert not saved.exists()


async def test_a_machine_that_had_not_loaded_its_state_is_started_anew(rig: Rig) -> None:
    machine = await running(rig)
    await rig.final(await rig.world.operations.vms.suspend(SYSTEM, "web1"))
    began, _ = blocked(rig, "start")
    task = await rig.world.operations.vms.start(SYSTEM, "web1")
    await began.wait()
    await rig.close()
    del rig.hypervisor.hooks["start"]
    half = FakeMachine(machine.plan, 77, rig.hypervisor)
    half.run_state = RunState.INCOMING
    rig.hypervisor.adoptable[machine.plan.id] = half
    directory = rig.environment.run_directory(machine.plan.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qmp.sock").touch()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert half.calls == ["quit"]
    assert rig.hypervisor.machine.plan.incoming is not None


async def test_suspended_just_before_the_daemon_went(rig: Rig) -> None:
    machine = await running(rig)
    vm = await rig.world.vm("web1")
    await rig.close()
    await rig.world.put("web1", VMState.SUSPENDING, Power.RUNNING)
    rig.environment.suspended_path(vm.meta.id).write_bytes(b"state")
    machine.ends("suspended")
    await rig.again()
    vm = await rig.until("web1", lambda vm: vm.status.state is VMState.SUSPENDED)
    assert vm.spec.power is Power.SUSPENDED


# -- watching ----------------------------------------------------------------------------------


async def test_a_full_disk_pauses_and_room_lets_it_go_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await running(rig)
    monkeypatch.setattr("undercroft.host.room.LOOK", 0.01)
    monkeypatch.setattr("undercroft.host.room.NEEDED", 1 << 62)
    machine.run_state = RunState.IO_ERROR
    assert machine.on_event is not None
    for kind, data in (("state", {}), ("io-error", {"no_space": True})):
        machine.on_event(MachineEvent(kind=kind, state=RunState.IO_ERROR, time=1.0, data=data))
    vm = await rig.until("web1", lambda vm: "disk is full" in (vm.status.message or ""))
    assert vm.status.state is VMState.PAUSED
    assert machine.calls == []
    monkeypatch.setattr("undercroft.host.room.NEEDED", 0)
    vm = await rig.until("web1", lambda vm: vm.status.state is VMState.RUNNING)
    assert vm.status.message is None
    assert (await events(rig))[-2:] == ["vm.io-error", "vm.resumed"]


async def test_a_guest_with_an_nvme_disk_waits_before_the_disk_is_full(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await running(rig)
    reserves = [1 << 40]
    monkeypatch.setattr("undercroft.host.room.LOOK", 0.01)
    monkeypatch.setattr("undercroft.host.room._reserves", lambda directories: reserves)
    monkeypatch.setattr("undercroft.host.room._has_room", lambda directory: reserves[0] > 0)
    guard = rig.actor(await rig.world.vm("web1")).guard
    reserves[0] = 0
    guard()
    await asyncio.sleep(0.05)
    assert machine.run_state is RunState.RUNNING  # QEMU sees to what disks it has
    nvme = PlanDisk(path=str(rig.environment.data / "x"), format=DiskFormat.QCOW2, bus=DiskBus.NVME)
    machine.plan = msgspec.structs.replace(machine.plan, disks=(*machine.plan.disks, nvme))
    guard()
    vm = await rig.until("web1", lambda vm: "disk is full" in (vm.status.message or ""))
    assert vm.status.state is VMState.PAUSED
    assert machine.calls[-1] == "pause"
    reserves[0] = 1 << 40
    vm = await rig.until("web1", lambda vm: vm.status.state is VMState.RUNNING)
    assert vm.status.message is None
    assert (await events(rig))[-2:] == ["vm.io-error", "vm.resumed"]


async def test_nothing_is_observed_after_the_end(rig: Rig) -> None:
    machine = await running(rig)
    assert machine.on_event is not None
    machine.on_event(
        MachineEvent(kind="io-error", state=RunState.IO_ERROR, time=1.0, data={"no_space": True})
    )
    await rig.final(await rig.world.operations.vms.stop(SYSTEM, "web1", FORCE))
    machine.on_event(MachineEvent(kind="agent", state=RunState.RUNNING, time=1.0, data={}))
    machine.on_event(
        MachineEvent(kind="io-error", state=RunState.IO_ERROR, time=1.0, data={"no_space": False})
    )
    await asyncio.sleep(0.05)
    vm = await rig.world.vm("web1")
    assert vm.status.state is VMState.STOPPED
    assert vm.status.agent is None
    assert vm.status.addresses == ()


async def test_addresses_come_from_the_agent_and_go_with_the_machine(rig: Rig) -> None:
    machine = await running(rig)
    assert (await rig.until("web1", lambda vm: vm.status.agent is not None)).status.agent is False
    machine.agent.answers = True
    assert machine.on_event is not None
    machine.on_event(MachineEvent(kind="agent", state=RunState.RUNNING, time=1.0, data={}))
    vm = await rig.until("web1", lambda vm: vm.status.agent is True)
    assert vm.status.addresses == ("10.0.2.15",)
    machine.ends("guest-shutdown")
    vm = await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPED)
    assert (vm.status.agent, vm.status.addresses) == (None, ())


async def test_the_clock_is_set_after_a_suspension(rig: Rig) -> None:
    await running(rig)
    await rig.final(await rig.world.operations.vms.suspend(SYSTEM, "web1"))
    await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    agent = rig.hypervisor.machine.agent
    async with asyncio.timeout(10):
        while not agent.times:
            await asyncio.sleep(0.002)


async def test_a_rename_is_seen_at_the_next_start(rig: Rig) -> None:
    await rig.final(await ask_create(rig))
    await rig.world.operations.vms.set(SYSTEM, "web1", VMChange(name="web2"))
    await rig.final(await rig.world.operations.vms.start(SYSTEM, "web2"))
    assert rig.hypervisor.machine.plan.name == "web2"
    await rig.final(await rig.world.operations.vms.remove(SYSTEM, "web2", force=True))
    await assert_nothing_left(rig)
    assert [e.object.name for e in await rig.world.all(Event) if e.type == "vm.removed"] == ["web2"]
