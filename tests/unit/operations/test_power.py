"""Switching VMs: in which states each verb is allowed, repeats, overtaking, and the queue."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable

import pytest

from tests.unit.operations.world import World
from undercroft.model.errors import (
    BusyError,
    InvalidError,
    NotFoundError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.requests import StopRequest, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM, Power, VMState
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import MAX_WAITING, new_task
from undercroft.store.interface import Put, Transaction

Switch = Callable[[World], Awaitable[Task]]


def power(verb: str, request: StopRequest | None = None) -> Switch:
    async def call(world: World) -> Task:
        method = getattr(world.operations.vms, verb)
        arguments = (request or StopRequest(),) if verb in ("stop", "restart") else ()
        task = await method(SYSTEM, "web1", *arguments)
        assert isinstance(task, Task)
        return task

    return call


FORCE = StopRequest(force=True)
VERBS: dict[str, Switch] = {
    verb: power(verb)
    for verb in ("start", "stop", "restart", "reset", "pause", "resume", "suspend")
} | {"stop --force": power("stop", FORCE)}

# What a VM is and should be, with nothing waiting, and the verbs that make sense then.
STATES: list[tuple[VMState, Power, str]] = [
    (VMState.STOPPED, Power.STOPPED, "start"),
    (VMState.FAILED, Power.STOPPED, "start"),
    # it should run, but crashed, and the agent waits before it starts it again
    (VMState.STOPPED, Power.RUNNING, "start stop stop--force"),
    (VMState.RUNNING, Power.RUNNING, "stop stop--force restart reset pause suspend"),
    (VMState.PAUSED, Power.PAUSED, "stop stop--force resume suspend"),
    # paused by QEMU, since the host's disk is full
    (VMState.PAUSED, Power.RUNNING, "stop stop--force restart reset pause resume suspend"),
    (VMState.SUSPENDED, Power.SUSPENDED, "start stop--force resume"),
    (VMState.REMOVING, Power.STOPPED, ""),
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(("state", "desired", "allowed"), STATES)
async def test_each_verb_in_each_state(
    world: World, state: VMState, desired: Power, allowed: str, verb: str
) -> None:
    await world.created("web1")
    before = await world.put("web1", state, desired)
    if verb.replace(" ", "") in allowed.split():
        task = await VERBS[verb](world)
        vm = await world.vm("web1")
        assert vm.tasks == (task.meta.id,)
        assert task.spec.verb == f"vm.{verb.split()[0]}"
        wanted = {"stop": Power.STOPPED, "pause": Power.PAUSED, "suspend": Power.SUSPENDED}
        assert vm.spec.power is wanted.get(verb.split()[0], Power.RUNNING)
        assert vm.status == before.status
    else:
        with pytest.raises(WrongStateError) as caught:
            await VERBS[verb](world)
        assert caught.value.object == "vm web1"
        assert caught.value.data["state"] == state
        assert await world.vm("web1") == before


async def test_what_waits_counts(world: World) -> None:
    """A VM that is about to be on can be paused, one that is about to be off can be started."""
    await world.created("web1")
    for verb in ("start", "pause", "resume", "suspend", "resume", "reset", "stop", "start"):
        await VERBS[verb](world)
    vm = await world.vm("web1")
    assert len(vm.tasks) == 8
    assert vm.spec.power is Power.RUNNING
    with pytest.raises(WrongStateError):
        await VERBS["resume"](world)
    await world.check_invariants()


@pytest.mark.parametrize("verb", VERBS)
async def test_a_repeat_gives_the_same_task(world: World, verb: str) -> None:
    await world.created("web1")
    for state, desired, allowed in STATES:
        if verb.replace(" ", "") in allowed.split():
            await world.put("web1", state, desired)
            break
    first = await VERBS[verb](world)
    revision = await world.store.revision()
    again = await VERBS[verb](world)
    assert again.meta.id == first.meta.id
    assert await world.store.revision() == revision
    assert (await world.vm("web1")).tasks == (first.meta.id,)


async def test_the_same_verb_with_other_arguments_is_another_request(world: World) -> None:
    await world.created("web1", start=True)
    gentle = await VERBS["stop"](world)
    longer = await power("stop", StopRequest(timeout=300))(world)
    assert gentle.meta.id != longer.meta.id
    assert longer.spec.arguments == {"force": False, "timeout": 300}


async def test_a_cancelled_task_is_not_given_again(world: World) -> None:
    await world.created("web1", start=True)
    first = await VERBS["stop"](world)
    await world.operations.tasks.cancel(SYSTEM, first.meta.id)
    again = await VERBS["stop"](world)
    assert again.meta.id != first.meta.id


async def test_force_overtakes_by_cancelling(world: World) -> None:
    await world.created("web1", start=True)
    gentle = await VERBS["stop"](world)
    await VERBS["start"](world)
    await VERBS["stop --force"](world)
    vm = await world.vm("web1")
    tasks = [await world.task(id) for id in vm.tasks]
    assert [(t.spec.verb, t.spec.cancel) for t in tasks] == [
        ("vm.stop", True),
        ("vm.start", True),
        ("vm.stop", False),
    ]
    assert vm.tasks[0] == gentle.meta.id
    assert vm.spec.power is Power.STOPPED
    await world.check_invariants()


async def test_a_gentle_stop_overtakes_nothing(world: World) -> None:
    await world.created("web1", start=True)
    first = await VERBS["pause"](world)
    await VERBS["stop"](world)
    assert not (await world.task(first.meta.id)).spec.cancel


async def test_force_spares_the_making_of_the_vm(world: World) -> None:
    """Whoever switches off what is being made does not want it gone."""
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="web1", start=True))
    await VERBS["stop --force"](world)
    assert not (await world.task(task.meta.id)).spec.cancel
    assert (await world.vm("web1")).spec.power is Power.STOPPED


@pytest.mark.parametrize("timeout", [-1.0, float("nan"), float("inf"), 86401.0])
async def test_nonsense_time_limits(world: World, timeout: float) -> None:
    await world.created("web1", start=True)
    for verb in ("stop", "restart"):
        with pytest.raises(InvalidError):
            await power(verb, StopRequest(timeout=timeout))(world)
    assert (await world.vm("web1")).tasks == ()


@pytest.mark.parametrize(
    "ref", ["nobody", "", "vm-0000000000000000", "é", "\udc80", "a\0b", "a" * 9999]
)
async def test_nobody(world: World, ref: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        await world.operations.vms.start(SYSTEM, ref)
    assert len(caught.value.message) < 200


async def test_the_queue_has_an_end(world: World) -> None:
    await world.created("web1", start=True)
    verbs = itertools.cycle(("pause", "resume"))
    for _ in range(MAX_WAITING):
        await VERBS[next(verbs)](world)
    with pytest.raises(BusyError) as caught:
        await VERBS[next(verbs)](world)
    assert caught.value.action
    assert len((await world.vm("web1")).tasks) == MAX_WAITING
    # What must always be possible still is.
    assert (await world.operations.vms.remove(SYSTEM, "web1", force=True)).spec.verb == "vm.remove"
    await world.check_invariants()


async def test_fifty_different_requests_at_once(world: World) -> None:
    await world.created("web1", start=True)
    calls = [call for _ in range(7) for call in VERBS.values()][:50]
    outcomes = await asyncio.gather(*(call(world) for call in calls), return_exceptions=True)
    assert all(isinstance(o, Task | WrongStateError | BusyError) for o in outcomes)
    given = {o.meta.id for o in outcomes if isinstance(o, Task)}
    vm = await world.vm("web1")
    assert set(vm.tasks) == given
    last = await world.task(vm.tasks[-1])
    wanted = {"vm.stop": Power.STOPPED, "vm.pause": Power.PAUSED, "vm.suspend": Power.SUSPENDED}
    assert vm.spec.power is wanted.get(last.spec.verb, Power.RUNNING)
    await world.check_invariants()


async def test_fifty_times_the_same_request_at_once_is_one_task(world: World) -> None:
    await world.created("web1")
    tasks = await asyncio.gather(*(VERBS["start"](world) for _ in range(50)))
    assert len({task.meta.id for task in tasks}) == 1
    assert (await world.vm("web1")).tasks == (tasks[0].meta.id,)


async def test_requests_race_with_a_host_that_finishes_tasks(world: World) -> None:
    await world.created("web1", start=True)
    ending = asyncio.Event()

    async def host() -> None:
        while True:
            vm = await world.vm("web1")
            if vm.tasks:
                await world.done(await world.task(vm.tasks[0]))
            elif ending.is_set():
                return
            await asyncio.sleep(0)

    working = asyncio.create_task(host())
    calls = [VERBS["pause"], VERBS["resume"]] * 25
    outcomes = await asyncio.gather(*(call(world) for call in calls), return_exceptions=True)
    ending.set()
    await working
    assert all(isinstance(o, Task | WrongStateError) for o in outcomes), outcomes
    for outcome in outcomes:
        if isinstance(outcome, Task):
            assert (await world.task(outcome.meta.id)).status.state is TaskState.SUCCEEDED
    await world.check_invariants()


async def test_a_task_that_is_gone_is_no_obstacle(world: World) -> None:
    """A queue that names a task that no longer exists (the host drops it when its turn comes)."""
    vm = await world.created("web1", start=True)
    lost = new_task(world.context, "vm.pause", vm, "me")
    await world.put("web1", VMState.RUNNING, Power.PAUSED, tasks=(lost.meta.id,))
    task = await VERBS["stop --force"](world)
    assert (await world.vm("web1")).tasks == (lost.meta.id, task.meta.id)


async def test_a_final_task_in_the_queue_is_not_cancelled(world: World) -> None:
    vm = await world.created("web1", start=True)
    over = new_task(world.context, "vm.pause", vm, "me")
    await world.store.transact(Transaction(puts=[Put(over)]))
    await world.end(over.meta.id, TaskState.FAILED)
    await world.put("web1", VMState.RUNNING, Power.RUNNING, tasks=(over.meta.id,))
    await VERBS["stop --force"](world)
    assert not (await world.task(over.meta.id)).spec.cancel


async def test_errors_say_what_to_do(world: World) -> None:
    await world.created("web1")
    await world.put("web1", VMState.SUSPENDED, Power.SUSPENDED)
    with pytest.raises(UndercroftError) as caught:
        await VERBS["stop"](world)
    assert "--force web1" in (caught.value.action or "")
    await world.put("web1", VMState.PAUSED, Power.PAUSED)
    with pytest.raises(UndercroftError) as caught:
        await VERBS["start"](world)
    assert "croft resume web1" in (caught.value.action or "")
    assert isinstance(await world.vm("web1"), VM)
