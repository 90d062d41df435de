"""Actors: the daemon goes in the middle of something, the next one takes it up."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.host.acting import FORCE, ask_create, assert_nothing_left, blocked, events, running
from tests.unit.host.rig import FakeMachine, Rig
from undercroft.host import orphans
from undercroft.model.errors import TimeLimitError
from undercroft.model.requests import StopRequest
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import ExitReason, VMState
from undercroft.operations.access import SYSTEM


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
