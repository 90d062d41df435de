"""Outcomes: all of it or nothing, whatever happens beside."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from tests.unit.host.rig import Rig
from undercroft.host import outcome
from undercroft.host.outcome import TaskRun, change_status, final_status, finish, write
from undercroft.model.errors import InvalidError, NoSpaceError, StaleError, WrongStateError
from undercroft.model.event import Event, EventLevel
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM, VMState
from undercroft.operations.context import new_event, new_task, scope
from undercroft.store.interface import Claim, Put, Release, Transaction, update


async def vm_with_tasks(rig: Rig, *verbs: str) -> tuple[VM, list[Task]]:
    """A VM that no actor sees to, with tasks of these verbs in its queue."""
    await rig.close()
    await rig.world.created("web1")
    vm = await rig.world.vm("web1")
    tasks = [new_task(rig.world.context, verb, vm, "alice") for verb in verbs]
    vm = msgspec.structs.replace(vm, tasks=tuple(task.meta.id for task in tasks))
    await rig.store.transact(Transaction(puts=[Put(vm), *map(Put, tasks)]))
    return vm, tasks


def stopped(vm: VM) -> VM:
    return change_status(vm, state=VMState.STOPPED)


async def test_task_object_and_event_in_one_transaction(rig: Rig) -> None:
    vm, (task, other) = await vm_with_tasks(rig, "vm.stop", "vm.start")
    before = await rig.store.revision()
    written = await finish(
        rig.environment,
        VM,
        vm.meta.id,
        task.meta.id,
        change=lambda v: change_status(v, message="there"),
        result={"n": 1},
        event=("vm.stopped", "it stopped", EventLevel.INFO),
    )
    assert await rig.store.revision() == before + 1
    assert written == await rig.world.vm("web1")
    assert written is not None
    assert written.tasks == (other.meta.id,)
    assert written.status.message == "there"
    done = await rig.world.task(task.meta.id)
    assert done.status.state is TaskState.SUCCEEDED
    assert (done.status.progress, done.status.result) == (1.0, {"n": 1})
    assert done.status.finished is not None
    (event,) = [e for e in await rig.world.all(Event) if e.type == "vm.stopped"]
    assert (event.by, event.task) == ("alice", task.meta.id)


async def test_a_refused_transaction_leaves_nothing(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")

    async def refuse(transaction: Transaction) -> int:
        raise InvalidError("no")

    with monkeypatch.context() as patched:
        patched.setattr(rig.store, "transact", refuse)
        with pytest.raises(InvalidError):
            await finish(rig.environment, VM, vm.meta.id, task.meta.id, change=stopped)
    assert await rig.world.vm("web1") == vm
    assert (await rig.world.task(task.meta.id)).status.state is TaskState.PENDING


async def test_others_who_interfere_lose_nothing(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")
    transact = rig.store.transact
    rounds = 0

    async def meddled(transaction: Transaction) -> int:
        nonlocal rounds
        if rounds < 5:
            rounds += 1
            current = await rig.world.vm("web1")
            cpus = msgspec.structs.replace(current.spec, cpus=10 + rounds)
            await transact(Transaction(puts=[Put(msgspec.structs.replace(current, spec=cpus))]))
        return await transact(transaction)

    monkeypatch.setattr(rig.store, "transact", meddled)
    await finish(
        rig.environment,
        VM,
        vm.meta.id,
        task.meta.id,
        change=lambda v: change_status(v, message="mine"),
    )
    written = await rig.world.vm("web1")
    assert (written.spec.cpus, written.status.message, written.tasks) == (15, "mine", ())
    await write(rig.environment, VM, vm.meta.id, lambda v: change_status(v, message="again"))
    assert (await rig.world.vm("web1")).status.message == "again"


async def test_for_ever_interfered_with_is_an_error(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")

    async def stale(transaction: Transaction) -> int:
        raise StaleError("changed")

    monkeypatch.setattr(rig.store, "transact", stale)
    with pytest.raises(StaleError):
        await finish(rig.environment, VM, vm.meta.id, task.meta.id, change=stopped)
    with pytest.raises(StaleError):
        await write(rig.environment, VM, vm.meta.id, lambda v: change_status(v, message="x"))


async def test_it_waits_for_room(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")
    monkeypatch.setattr(outcome, "RETRY_INTERVAL", 0.001)
    transact = rig.store.transact
    refusals = iter([NoSpaceError("full")] * 250)

    async def full(transaction: Transaction) -> int:
        for refusal in refusals:
            raise refusal
        return await transact(transaction)

    monkeypatch.setattr(rig.store, "transact", full)
    await finish(rig.environment, VM, vm.meta.id, task.meta.id, change=stopped)
    assert (await rig.world.task(task.meta.id)).status.state is TaskState.SUCCEEDED


async def test_it_does_not_wait_while_the_daemon_closes(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")
    rig.environment.closing = True

    async def full(transaction: Transaction) -> int:
        raise NoSpaceError("full")

    monkeypatch.setattr(rig.store, "transact", full)
    with pytest.raises(NoSpaceError):
        await finish(rig.environment, VM, vm.meta.id, task.meta.id, change=stopped)


async def test_the_object_goes_and_with_it_all_that_waits(rig: Rig) -> None:
    vm, tasks = await vm_with_tasks(rig, "vm.remove", "vm.start", "vm.remove")
    claim = scope("vm")
    await finish(
        rig.environment,
        VM,
        vm.meta.id,
        tasks[0].meta.id,
        change=lambda v: None,
        extra=lambda v: ([], [], [Release(claim, v.meta.name, v.meta.id)]),
        event=("vm.removed", "gone", EventLevel.INFO),
    )
    assert await rig.world.all(VM) == []
    assert await rig.store.resolve(claim, "web1") is None
    states = [(await rig.world.task(task.meta.id)).status.state for task in tasks]
    assert states == [TaskState.SUCCEEDED, TaskState.CANCELLED, TaskState.SUCCEEDED]


async def test_an_object_that_is_gone_already(rig: Rig) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")
    await finish(rig.environment, VM, vm.meta.id, "task-0000000000000000", change=lambda v: None)
    assert await rig.world.all(VM) == []
    assert await finish(rig.environment, VM, vm.meta.id, task.meta.id, change=lambda v: v) is None
    assert (await rig.world.task(task.meta.id)).status.state.final
    assert await write(rig.environment, VM, vm.meta.id, stopped) is None


async def test_a_final_task_is_not_rewritten(rig: Rig) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.stop")
    await rig.world.end(task.meta.id, TaskState.CANCELLED)
    before = await rig.world.task(task.meta.id)
    await finish(rig.environment, VM, vm.meta.id, task.meta.id, change=stopped)
    assert await rig.world.task(task.meta.id) == before
    assert (await rig.world.vm("web1")).tasks == ()


async def test_what_does_not_change_is_not_written(rig: Rig) -> None:
    vm, _ = await vm_with_tasks(rig)
    before = await rig.store.revision()
    told = lambda v: [new_event(1.0, "vm.odd", v, "odd")]  # noqa: E731
    assert await write(rig.environment, VM, vm.meta.id, lambda v: v, told) == vm
    assert await write(rig.environment, VM, vm.meta.id, lambda v: None, told) == vm
    assert await rig.store.revision() == before


async def test_what_is_being_removed_stays_so(rig: Rig) -> None:
    vm, _ = await vm_with_tasks(rig)
    going = change_status(vm, state=VMState.REMOVING)
    assert change_status(going, state=VMState.RUNNING, message="x").status.state == "removing"
    assert change_status(going, message="x").status.message == "x"


async def test_progress_is_bounded_but_phases_are_not(rig: Rig) -> None:
    _, (task,) = await vm_with_tasks(rig, "vm.stop")
    run = TaskRun(rig.environment, task)
    await run.begin()
    before = await rig.store.revision()
    for n in range(100):
        await run.progress(n / 100, "reading")
    assert await rig.store.revision() == before + 1
    await run.progress(0.5, "writing")
    assert (await rig.world.task(task.meta.id)).status.phase == "writing"
    await run.checkpoint(a=1)
    await run.checkpoint(b=2)
    assert (await rig.world.task(task.meta.id)).status.checkpoint == {"a": 1, "b": 2}


async def test_what_is_final_does_not_come_back(rig: Rig) -> None:
    _, (task,) = await vm_with_tasks(rig, "vm.stop")
    run = TaskRun(rig.environment, task)
    await rig.world.end(task.meta.id, TaskState.CANCELLED)
    await run.begin()
    await run.progress(0.5, "still at it")
    written = await rig.world.task(task.meta.id)
    assert (written.status.state, written.status.phase) == (TaskState.CANCELLED, "")


async def test_a_request_to_cancel_survives_progress(rig: Rig) -> None:
    _, (task,) = await vm_with_tasks(rig, "vm.stop")
    run = TaskRun(rig.environment, task)

    async def work() -> None:
        for n in range(20):
            await run.progress(None, f"phase {n}")

    async def cancel() -> None:
        await update(
            rig.store,
            Task,
            task.meta.id,
            lambda t: msgspec.structs.replace(t, spec=msgspec.structs.replace(t.spec, cancel=True)),
        )

    await asyncio.gather(work(), cancel())
    written = await rig.world.task(task.meta.id)
    assert written.spec.cancel
    assert written.status.phase == "phase 19"


@pytest.mark.parametrize(
    ("error", "cancelled", "state"),
    [
        (None, False, TaskState.SUCCEEDED),
        (None, True, TaskState.CANCELLED),
        (WrongStateError("no"), False, TaskState.FAILED),
        (WrongStateError("no"), True, TaskState.CANCELLED),
    ],
)
async def test_final_states(rig: Rig, error: Any, cancelled: bool, state: TaskState) -> None:
    _, (task,) = await vm_with_tasks(rig, "vm.stop")
    final = final_status(task, 9.0, error, cancelled, None)
    assert final.status.state is state
    assert (final.status.error is not None) == (state is TaskState.FAILED)
    assert (final.status.started, final.status.finished) == (9.0, 9.0)
    assert (final.status.progress == 1.0) == (state is TaskState.SUCCEEDED)


async def test_claims_can_be_released_only_by_their_holder(rig: Rig) -> None:
    vm, (task,) = await vm_with_tasks(rig, "vm.remove")
    await rig.store.transact(Transaction(claims=[Claim("vm/default", "other", "vm-x")]))
    await finish(
        rig.environment,
        VM,
        vm.meta.id,
        task.meta.id,
        change=lambda v: None,
        extra=lambda v: ([], [], [Release("vm/default", "other", v.meta.id)]),
    )
    assert await rig.store.resolve("vm/default", "other") == "vm-x"
