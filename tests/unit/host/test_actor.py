"""Actors: tasks that succeed, fail, are cancelled or cut off at any point, and machines that end by
themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from tests.unit.host.rig import FakeMachine, Rig, refused
from tests.unit.operations.world import HOST
from undercroft.host import exits, orphans, outcome
from undercroft.hypervisor.machine import MachineEvent, RunState
from undercroft.model.errors import NoSpaceError, ProgramError, QmpError, TimeLimitError
from undercroft.model.event import Event
from undercroft.model.requests import StopRequest, VMChange, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.units import GiB
from undercroft.model.vm import VM, ExitReason, Forward, Power, RestartPolicy, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import new_task, scope
from undercroft.store.interface import Put, Transaction, update

FORCE = StopRequest(force=True)


async def ask_create(rig: Rig, **values: Any) -> Task:
    values.setdefault("name", "web1")
    values.setdefault("disk", GiB)
    values.setdefault("forwards", (Forward(guest_port=1, host_port=8080),))
    request = VMCreate(**values)
    return await rig.world.operations.vms.create(SYSTEM, request)


async def running(rig: Rig, **values: Any) -> FakeMachine:
    """A VM that runs."""
    task = await rig.final(await ask_create(rig, start=True, **values))
    assert task.status.state is TaskState.SUCCEEDED
    return rig.hypervisor.machine


def blocked(rig: Rig, name: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Makes a call take until told; returns what says that it began, and what ends it."""
    began, go = asyncio.Event(), asyncio.Event()

    async def hook() -> None:
        began.set()
        await go.wait()

    rig.hypervisor.hooks[name] = hook
    return began, go


async def events(rig: Rig) -> list[str]:
    listing = await rig.world.operations.events.list(SYSTEM, limit=1000)
    return [item.record.type for item in listing.items]


async def assert_nothing_left(rig: Rig) -> None:
    assert await rig.world.all(VM) == []
    assert await rig.world.all(Volume) == []
    for where, name in (
        (scope("vm"), "web1"),
        (scope("volume"), "web1-boot"),
        (f"port/{HOST}", "tcp/8080"),
    ):
        assert await rig.store.resolve(where, name) is None
    data = rig.environment.data
    for directory in ("vms", "volumes", "run/vms"):
        assert not (data / directory).exists() or list((data / directory).iterdir()) == []
    for task in await rig.world.all(Task):
        assert task.status.state.final, f"{task.spec.verb} waits for ever"


# -- success --------------------------------------------------------------------------------


async def test_create_and_start(rig: Rig) -> None:
    task = await rig.final(await ask_create(rig, start=True))
    assert task.status.state is TaskState.SUCCEEDED
    assert task.status.result["vm"] == task.spec.object.id
    vm = await rig.world.vm("web1")
    assert vm.status.state is VMState.RUNNING
    assert vm.status.instance == rig.hypervisor.machine.instance
    assert vm.tasks == ()
    assert rig.environment.volume_path(vm.spec.disks[0].volume).exists()
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


# -- failure --------------------------------------------------------------------------------


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


# -- cancelling -----------------------------------------------------------------------------


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


# -- the daemon goes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook", "ask"),
    [
        ("create_volume", lambda rig: ask_create(rig, name="other", start=True, forwards=())),
        ("pause", lambda rig: rig.world.operations.vms.pause(SYSTEM, "web1")),
        ("quit", lambda rig: rig.world.operations.vms.stop(SYSTEM, "web1", FORCE)),
        ("suspend", lambda rig: rig.world.operations.vms.suspend(SYSTEM, "web1")),
        ("quit", lambda rig: rig.world.operations.vms.remove(SYSTEM, "web1", force=True)),
        (
            "power_button",
            lambda rig: rig.world.operations.vms.restart(SYSTEM, "web1", StopRequest()),
        ),
    ],
)
async def test_the_next_daemon_carries_on(
    rig: Rig, hook: str, ask: Callable[[Rig], Awaitable[Task]]
) -> None:
    machine = await running(rig)
    began, _ = blocked(rig, hook)
    task = await ask(rig)
    await began.wait()
    async with asyncio.timeout(10):
        await rig.close()
    assert machine.detached
    left = await rig.world.task(task.meta.id)
    assert not left.status.state.final
    del rig.hypervisor.hooks[hook]
    rig.hypervisor.adoptable[machine.plan.id] = machine
    machine.detached = False
    directory = rig.environment.run_directory(machine.plan.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qmp.sock").touch()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED


async def test_a_removal_that_a_dead_daemon_began_cannot_be_cancelled(rig: Rig) -> None:
    machine = await running(rig)
    began, _ = blocked(rig, "quit")
    task = await rig.world.operations.vms.remove(SYSTEM, "web1", force=True)
    await began.wait()
    await rig.close()
    del rig.hypervisor.hooks["quit"]
    machine.ends("quit")
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    await assert_nothing_left(rig)


async def test_undoing_a_creation_is_taken_up_by_the_next_daemon(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, _ = blocked(rig, "create_volume")
    task = await ask_create(rig)
    await began.wait()
    removing = asyncio.Event()

    async def never(*_: object) -> None:
        removing.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patched:
        patched.setattr("undercroft.host.creation.in_thread", never)
        await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
        await removing.wait()
        await rig.close()
    assert not (await rig.world.task(task.meta.id)).status.state.final
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.CANCELLED
    await assert_nothing_left(rig)


async def test_closing_while_a_cancelled_task_puts_things_back(rig: Rig) -> None:
    """Closing must neither hang nor take the place of the user's request."""
    await rig.final(await ask_create(rig))
    began = asyncio.Event()

    async def slow_to_go() -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.1)

    rig.hypervisor.hooks["start"] = slow_to_go
    task = await rig.world.operations.vms.start(SYSTEM, "web1")
    await began.wait()
    await rig.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    await asyncio.sleep(0.01)
    async with asyncio.timeout(10):
        await rig.close()
    assert rig.hypervisor.alive == set()
    await rig.again()
    assert (await rig.final(task)).status.state is TaskState.CANCELLED


async def test_closing_while_it_starts_by_itself(rig: Rig) -> None:
    machine = await running(rig)
    began, _ = blocked(rig, "start")
    machine.ends("signal", signal=9)
    await began.wait()
    async with asyncio.timeout(10):
        await rig.close()
    assert rig.hypervisor.alive == set()
    del rig.hypervisor.hooks["start"]
    await rig.again()
    await rig.until("web1", lambda vm: vm.status.state is VMState.RUNNING)


async def test_a_vm_that_runs_is_taken_over_and_left_alone(rig: Rig) -> None:
    machine = await running(rig)
    rig.hypervisor.adoptable[machine.plan.id] = machine
    directory = rig.environment.run_directory(machine.plan.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qmp.sock").touch()
    await rig.again()
    vm = await rig.world.vm("web1")
    assert vm.status.state is VMState.RUNNING
    assert machine.calls == []
    await rig.final(await rig.world.operations.vms.pause(SYSTEM, "web1"))
    assert machine.calls == ["pause"]


async def test_a_vm_that_is_gone_is_started_again(rig: Rig) -> None:
    machine = await running(rig)
    await rig.close()
    machine.ends("unknown")
    await rig.again()
    await rig.until("web1", lambda vm: len(rig.hypervisor.machines) == 2 and not vm.tasks)
    vm = await rig.until("web1", lambda vm: vm.status.state is VMState.RUNNING)
    assert vm.status.last_exit is not None
    assert vm.status.last_exit.reason is ExitReason.LOST
    assert "vm.lost" in await events(rig)


async def unreachable(rig: Rig) -> FakeMachine:
    machine = await running(rig)
    await rig.close()
    rig.hypervisor.adoptable[machine.plan.id] = TimeLimitError("no answer")
    directory = rig.environment.run_directory(machine.plan.id)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "qmp.sock").touch()
    await rig.again()
    return machine


async def test_one_that_does_not_answer_is_neither_lost_nor_started_twice(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("undercroft.host.actor.RETRY_ADOPTION", 0.01)
    machine = await unreachable(rig)
    task = await rig.world.operations.vms.pause(SYSTEM, "web1")
    await asyncio.sleep(0.05)
    assert len(rig.hypervisor.machines) == 1
    assert rig.actor(machine.plan.id).accounts_for_process
    assert not (await rig.world.task(task.meta.id)).status.state.final
    rig.hypervisor.adoptable[machine.plan.id] = machine  # it was only slow
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert machine.calls == ["pause"]


@pytest.mark.parametrize("verb", ["stop", "remove"])
async def test_one_that_does_not_answer_ends_by_force(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    machine = await unreachable(rig)
    killed = []

    def kill(data: object, vm: str) -> None:
        killed.append(vm)
        rig.hypervisor.alive.discard(vm)
        rig.hypervisor.adoptable.clear()

    monkeypatch.setattr(orphans, "end_machine", kill)
    vms = rig.world.operations.vms
    if verb == "stop":
        task = await vms.stop(SYSTEM, "web1", FORCE)
    else:
        task = await vms.remove(SYSTEM, "web1", force=True)
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert killed == [machine.plan.id]


# -- ends by itself -------------------------------------------------------------------------


async def test_what_crashes_is_started_again_and_counted(rig: Rig) -> None:
    machine = await running(rig)
    machine.ends("error", code=1, message="assertion failed")
    vm = await rig.until(
        "web1", lambda vm: vm.status.state is VMState.RUNNING and vm.status.restarts == 1
    )
    assert vm.status.instance == rig.hypervisor.machine.instance
    assert vm.spec.power is Power.RUNNING
    assert vm.status.last_exit is not None
    assert vm.status.last_exit.reason is ExitReason.CRASHED
    types = await events(rig)
    assert types[-2:] == ["vm.crashed", "vm.restarted"]


async def test_restarts_have_a_limit(rig: Rig) -> None:
    await running(rig)
    for counted in range(1, exits.MAX_RESTARTS + 1):
        rig.hypervisor.machine.ends("error", code=1)
        await rig.until("web1", lambda vm: vm.status.restarts == counted)  # noqa: B023
        await rig.state("web1", VMState.RUNNING)
    rig.hypervisor.machine.ends("error", code=1)
    vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
    assert vm.status.state is VMState.STOPPED
    await asyncio.sleep(0.05)
    assert len(rig.hypervisor.machines) == exits.MAX_RESTARTS + 1
    await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert (await rig.world.vm("web1")).status.restarts == 0


async def test_starts_that_fail_count_too(rig: Rig) -> None:
    machine = await running(rig)
    rig.hypervisor.failures = [refused() if n % 2 else ValueError("odd") for n in range(20)]
    machine.ends("error", code=1)
    vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
    assert vm.status.state is VMState.STOPPED
    assert len(rig.hypervisor.failures) == 20 - exits.MAX_RESTARTS
    assert (await events(rig)).count("vm.restart.failed") == exits.MAX_RESTARTS


@pytest.mark.parametrize(
    ("policy", "hint", "again"),
    [
        (RestartPolicy.NEVER, "error", False),
        (RestartPolicy.ON_FAILURE, "guest-shutdown", False),
        (RestartPolicy.ON_FAILURE, "guest-panic", True),
        (RestartPolicy.ALWAYS, "guest-shutdown", True),
    ],
)
async def test_the_policy_decides(rig: Rig, policy: RestartPolicy, hint: str, again: bool) -> None:
    machine = await running(rig, restart=policy)
    machine.ends(hint)
    if again:
        await rig.until("web1", lambda vm: vm.status.restarts == 1)
        await rig.state("web1", VMState.RUNNING)
    else:
        vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
        assert vm.status.state is VMState.STOPPED
        assert len(rig.hypervisor.machines) == 1


async def test_what_was_paused_is_not_started_by_a_crash(rig: Rig) -> None:
    machine = await running(rig)
    await rig.final(await rig.world.operations.vms.pause(SYSTEM, "web1"))
    machine.ends("error", code=1)
    vm = await rig.until("web1", lambda vm: vm.spec.power is Power.STOPPED)
    assert vm.status.state is VMState.STOPPED
    assert len(rig.hypervisor.machines) == 1


async def test_it_ends_during_a_task(rig: Rig) -> None:
    machine = await running(rig)

    async def crash() -> None:
        machine.ends("error", code=1)
        raise QmpError("its monitor went away")

    rig.hypervisor.hooks["reset"] = crash
    task = await rig.final(await rig.world.operations.vms.reset(SYSTEM, "web1"))
    assert task.status.state is TaskState.FAILED
    vm = await rig.until("web1", lambda vm: vm.status.restarts == 1)
    vm = await rig.state("web1", VMState.RUNNING)
    assert vm.status.instance == rig.hypervisor.machine.instance
    assert len(rig.hypervisor.machines) == 2


async def test_it_crashes_while_it_is_asked_to_stop(rig: Rig) -> None:
    machine = await running(rig)

    async def crash() -> None:
        machine.ends("signal", signal=11)
        raise QmpError("its monitor went away")

    rig.hypervisor.hooks["power_button"] = crash
    task = await rig.final(await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest()))
    assert task.status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert vm.status.last_exit is not None
    assert vm.status.last_exit.reason is ExitReason.CRASHED
    await asyncio.sleep(0.03)
    assert len(rig.hypervisor.machines) == 1


async def test_a_stop_that_comes_while_it_starts_again(rig: Rig) -> None:
    machine = await running(rig)
    began, go = blocked(rig, "start")
    machine.ends("error", code=1)
    await began.wait()
    task = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest())
    await asyncio.sleep(0.02)
    go.set()
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    vm = await rig.world.vm("web1")
    assert (vm.status.state, vm.spec.power) == (VMState.STOPPED, Power.STOPPED)
    assert rig.hypervisor.alive == set()
    await asyncio.sleep(0.03)
    assert len(rig.hypervisor.machines) == 2


async def test_a_stop_that_comes_before_it_starts_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "backoff", lambda restarts: 60.0)
    machine = await running(rig)
    machine.ends("error", code=1)
    await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPED)
    task = await rig.world.operations.vms.stop(SYSTEM, "web1", StopRequest())
    assert (await rig.final(task)).status.state is TaskState.SUCCEEDED
    assert (await rig.world.vm("web1")).spec.power is Power.STOPPED
    assert len(rig.hypervisor.machines) == 1


async def test_a_start_by_hand_does_not_wait_for_the_automatic_one(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exits, "backoff", lambda restarts: 60.0)
    machine = await running(rig)
    machine.ends("error", code=1)
    await rig.until("web1", lambda vm: vm.status.state is VMState.STOPPED)
    task = await rig.final(await rig.world.operations.vms.start(SYSTEM, "web1"))
    assert task.status.state is TaskState.SUCCEEDED
    assert (await rig.world.vm("web1")).status.restarts == 0


# -- saved state ----------------------------------------------------------------------------


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


# -- watching -------------------------------------------------------------------------------


async def test_a_full_disk_pauses_and_room_lets_it_go_on(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = await running(rig)
    monkeypatch.setattr("undercroft.host.observer.ROOM_LOOK", 0.01)
    monkeypatch.setattr("undercroft.host.observer.ROOM_NEEDED", 1 << 62)
    machine.run_state = RunState.IO_ERROR
    assert machine.on_event is not None
    for kind, data in (("state", {}), ("io-error", {"no_space": True})):
        machine.on_event(MachineEvent(kind=kind, state=RunState.IO_ERROR, time=1.0, data=data))
    vm = await rig.until("web1", lambda vm: "disk is full" in (vm.status.message or ""))
    assert vm.status.state is VMState.PAUSED
    assert machine.calls == []
    monkeypatch.setattr("undercroft.host.observer.ROOM_NEEDED", 0)
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
