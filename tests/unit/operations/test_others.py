"""Tasks, events, hosts, reaching into guests; and that each needs its privilege."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from tests.unit.operations.world import HOST, World, holding
from undercroft.model.base import Meta
from undercroft.model.errors import ForbiddenError, InvalidError, NotFoundError, WrongStateError
from undercroft.model.event import Event
from undercroft.model.host import Host
from undercroft.model.image import ImageSourceKind
from undercroft.model.requests import (
    ExecRequest,
    ImageCreate,
    StopRequest,
    VMChange,
    VMCreate,
)
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import Power, VMState
from undercroft.operations.access import PRIVILEGES, SYSTEM, VIEW, Caller
from undercroft.operations.context import new_event
from undercroft.store.interface import Claim, Delete, Put, Transaction


async def content() -> AsyncIterator[bytes]:
    yield b"abc"


# -- privileges -----------------------------------------------------------------------------

Call = Callable[[World, Caller], Awaitable[Any]]


async def upload(world: World, caller: Caller) -> Any:
    return world.operations.images.upload_path(caller, "x")


NEEDED: list[tuple[str, str, Call]] = [
    ("vm.create", "create", lambda w, c: w.operations.vms.create(c, VMCreate(name="new"))),
    ("vm.view", "get", lambda w, c: w.operations.vms.get(c, "on")),
    ("vm.view", "list", lambda w, c: w.operations.vms.list(c)),
    ("vm.power", "start", lambda w, c: w.operations.vms.start(c, "off")),
    ("vm.power", "stop", lambda w, c: w.operations.vms.stop(c, "on", StopRequest())),
    ("vm.power", "restart", lambda w, c: w.operations.vms.restart(c, "on", StopRequest())),
    ("vm.power", "reset", lambda w, c: w.operations.vms.reset(c, "on")),
    ("vm.power", "pause", lambda w, c: w.operations.vms.pause(c, "on")),
    ("vm.power", "resume", lambda w, c: w.operations.vms.resume(c, "halted")),
    ("vm.power", "suspend", lambda w, c: w.operations.vms.suspend(c, "on")),
    ("vm.change", "set", lambda w, c: w.operations.vms.set(c, "off", VMChange(cpus=2))),
    ("vm.remove", "remove", lambda w, c: w.operations.vms.remove(c, "off")),
    ("vm.guest", "exec", lambda w, c: w.operations.vms.exec(c, "on", ExecRequest(argv=("id",)))),
    ("vm.guest", "read_file", lambda w, c: w.operations.vms.read_file(c, "on", "/etc/hosts")),
    ("vm.guest", "write", lambda w, c: w.operations.vms.write_file(c, "on", "/x", content())),
    ("vm.console", "screenshot", lambda w, c: w.operations.vms.screenshot(c, "on")),
    ("vm.console", "console", lambda w, c: w.operations.vms.console(c, "on")),
    ("vm.console", "vnc", lambda w, c: w.operations.vms.vnc(c, "on")),
    ("vm.console", "log", lambda w, c: w.operations.vms.log(c, "off")),
    (
        "image.create",
        "image",
        lambda w, c: w.operations.images.create(
            c, ImageCreate(source=ImageSourceKind.BUILD, value="tiny")
        ),
    ),
    ("image.create", "upload", upload),
    ("image.view", "image get", lambda w, c: w.operations.images.get(c, "debian")),
    ("image.view", "catalogue", lambda w, c: w.operations.images.catalogue(c)),
    ("image.view", "image list", lambda w, c: w.operations.images.list(c)),
    ("image.remove", "image remove", lambda w, c: w.operations.images.remove(c, "debian")),
    ("volume.view", "volume list", lambda w, c: w.operations.volumes.list(c)),
    ("volume.view", "volume get", lambda w, c: w.operations.volumes.get(c, "off-boot")),
    ("task.view", "task list", lambda w, c: w.operations.tasks.list(c)),
    ("task.view", "task get", lambda w, c: w.operations.tasks.get(c, "TASK")),
    ("task.view", "task wait", lambda w, c: w.operations.tasks.wait(c, "TASK", 0)),
    ("task.cancel", "task cancel", lambda w, c: w.operations.tasks.cancel(c, "TASK")),
    ("event.view", "events", lambda w, c: w.operations.events.list(c)),
    ("host.view", "host get", lambda w, c: w.operations.hosts.get(c)),
    ("host.view", "host list", lambda w, c: w.operations.hosts.list(c)),
    ("host.check", "check", lambda w, c: w.operations.hosts.check(c)),
    ("vm.view", "samples", lambda w, c: w.operations.hosts.samples(c)),
]


@pytest.mark.parametrize(("privilege", "name", "call"), NEEDED, ids=[n for _, n, _ in NEEDED])
async def test_each_operation_needs_its_privilege_and_no_other(
    world: World, privilege: str, name: str, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.created("off", disk=1 << 30)
    await world.created("on", start=True)
    await world.created("halted")
    await world.put("halted", VMState.PAUSED, Power.PAUSED)
    await world.image("debian")
    host = Host(meta=Meta(id=HOST, name="here", created=1.0))
    await world.store.transact(
        Transaction(puts=[Put(host)], claims=[Claim("host/default", "here", HOST)])
    )
    if name.startswith("task"):
        first = (await world.operations.tasks.list(SYSTEM)).items[0].record.meta.id
        method = getattr(world.operations.tasks, name.split()[1])
        extra = (0,) if name == "task wait" else ()
        if name != "task list":

            async def on_task(world: World, caller: Caller) -> Any:
                return await method(caller, first, *extra)

            call = on_task
    revision = await world.store.revision()
    with pytest.raises(ForbiddenError) as caught:
        await call(world, Caller("somebody", PRIVILEGES - {privilege}))
    assert caught.value.data["privilege"] == privilege
    assert await world.store.revision() == revision
    assert world.services.calls == []
    await call(world, holding(privilege))


async def test_starting_at_creation_is_a_privilege_too(world: World) -> None:
    with pytest.raises(ForbiddenError, match=r"vm\.power"):
        await world.operations.vms.create(holding("vm.create"), VMCreate(name="a", start=True))


def test_privileges_of_callers() -> None:
    assert all(SYSTEM.has(privilege) for privilege in PRIVILEGES)
    assert not any(holding().has(privilege) for privilege in PRIVILEGES)
    assert "vm.view" in VIEW
    assert "vm.power" not in VIEW


async def test_who_asked_is_written_down(world: World) -> None:
    caller = Caller("alice", PRIVILEGES)
    task = await world.operations.vms.create(caller, VMCreate(name="a"))
    assert task.spec.by == "alice"
    assert [event.by for event in await world.all(Event)] == ["alice"]


# -- tasks ----------------------------------------------------------------------------------


async def test_waiting_for_a_task(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    waiting = asyncio.create_task(world.operations.tasks.wait(SYSTEM, task.meta.id, 60))
    await asyncio.sleep(0.01)
    await world.operations.vms.create(SYSTEM, VMCreate(name="b"))  # a change of another
    await world.done(task, VMState.STOPPED)
    found = await waiting
    assert found.record.status.state is TaskState.SUCCEEDED
    assert (await world.operations.tasks.wait(SYSTEM, task.meta.id, 60)) == found


async def test_waiting_ends_with_the_time(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    for timeout in (0.02, 0, -1):
        found = await world.operations.tasks.wait(SYSTEM, task.meta.id, timeout)
        assert found.record.status.state is TaskState.PENDING


async def test_many_wait_for_one(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    waiting = [
        asyncio.create_task(world.operations.tasks.wait(SYSTEM, task.meta.id, 60))
        for _ in range(20)
    ]
    await asyncio.sleep(0)
    await world.done(task, VMState.STOPPED)
    assert {(await one).record.status.state for one in waiting} == {TaskState.SUCCEEDED}


async def test_waiting_for_a_task_that_is_older_than_history(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    await world.operations.vms.create(SYSTEM, VMCreate(name="b"))
    await world.store.compact(0)
    waiting = asyncio.create_task(world.operations.tasks.wait(SYSTEM, task.meta.id, 60))
    await asyncio.sleep(0.01)
    await world.store.compact(0)
    await world.done(task, VMState.STOPPED)
    assert (await waiting).record.status.state is TaskState.SUCCEEDED


async def test_waiting_for_a_task_that_is_forgotten(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    waiting = asyncio.create_task(world.operations.tasks.wait(SYSTEM, task.meta.id, 60))
    await asyncio.sleep(0.01)
    await world.store.transact(Transaction(deletes=[Delete(Task, task.meta.id)]))
    with pytest.raises(NotFoundError):
        await waiting


async def test_cancelling(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    found = await world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert found.record.spec.cancel
    assert await world.operations.tasks.cancel(SYSTEM, task.meta.id) == found
    await world.end(task.meta.id, TaskState.CANCELLED)
    final = await world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert final.record.status.state is TaskState.CANCELLED


async def test_a_finished_task_is_not_cancelled(world: World) -> None:
    task = await world.operations.vms.create(SYSTEM, VMCreate(name="a"))
    await world.done(task, VMState.STOPPED)
    found = await world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert not found.record.spec.cancel
    with pytest.raises(NotFoundError):
        await world.operations.tasks.cancel(SYSTEM, "task-0000000000000000")


# -- events ---------------------------------------------------------------------------------


async def test_events_from_a_revision_on(world: World) -> None:
    a, b = await world.created("a"), await world.created("b")
    start = await world.store.revision()
    for n in range(10):
        event = new_event(float(n), "vm.started", a if n % 2 else b, f"number {n}")
        await world.store.transact(Transaction(puts=[Put(event)]))

    async def told(**values: Any) -> list[str]:
        listing = await world.operations.events.list(SYSTEM, **values)
        assert [i.revision for i in listing.items] == sorted(i.revision for i in listing.items)
        return [item.record.message for item in listing.items]

    assert await told(limit=3) == ["number 7", "number 8", "number 9"]
    assert await told(after=start, limit=3) == ["number 0", "number 1", "number 2"]
    assert await told(after=start + 8) == ["number 8", "number 9"]
    assert await told(after=await world.store.revision()) == []
    assert await told(limit=0) == []
    assert await told(after=start, limit=0) == []
    assert await told(limit=-5) == []
    assert await told(after=start, object="a") == [f"number {n}" for n in range(1, 10, 2)]
    assert await told(after=start, object=b.meta.id) == [f"number {n}" for n in range(0, 10, 2)]


# -- hosts and guests -----------------------------------------------------------------------


async def test_only_what_runs_can_be_reached_into(world: World) -> None:
    await world.created("off")
    vms = world.operations.vms
    calls: list[Awaitable[Any]] = [
        vms.exec(SYSTEM, "off", ExecRequest(argv=("id",))),
        vms.read_file(SYSTEM, "off", "/x"),
        vms.write_file(SYSTEM, "off", "/x", content()),
        vms.screenshot(SYSTEM, "off"),
        vms.console(SYSTEM, "off"),
        vms.vnc(SYSTEM, "off"),
    ]
    for call in calls:
        with pytest.raises(WrongStateError) as caught:
            await call
        assert "croft start off" in (caught.value.action or "")
    assert world.services.calls == []
    assert await vms.log(SYSTEM, "off") == b"booted\n"


@pytest.mark.parametrize(
    "request_",
    [
        ExecRequest(argv=()),
        ExecRequest(argv=("",)),
        ExecRequest(argv=("x" * (1 << 18),)),
        ExecRequest(argv=("id",), timeout=0),
        ExecRequest(argv=("id",), timeout=float("nan")),
        ExecRequest(argv=("id",), input=bytes((16 << 20) + 1)),
    ],
)
async def test_nonsense_to_execute(world: World, request_: ExecRequest) -> None:
    await world.created("on", start=True)
    with pytest.raises(InvalidError):
        await world.operations.vms.exec(SYSTEM, "on", request_)
    assert world.services.calls == []


@pytest.mark.parametrize("path", ["", "x", "./x", "/a\0b", "/" + "x" * 5000])
async def test_nonsense_paths(world: World, path: str) -> None:
    await world.created("on", start=True)
    with pytest.raises(InvalidError):
        await world.operations.vms.read_file(SYSTEM, "on", path)
    with pytest.raises(InvalidError):
        await world.operations.vms.write_file(SYSTEM, "on", path, content())
    with pytest.raises(InvalidError):
        await world.operations.vms.write_file(SYSTEM, "on", "/x", content(), 0o10000)


async def test_limits_are_kept_within_bounds(world: World) -> None:
    vm = await world.created("on", start=True)
    await world.operations.vms.log(SYSTEM, "on", -1)
    await world.operations.vms.log(SYSTEM, "on", 1 << 40)
    await world.operations.vms.console(SYSTEM, "on", -1)
    id = vm.meta.id
    assert world.services.calls == [
        ("log", id, 0),
        ("log", id, 1 << 20),
        ("console", id, 0),
    ]


async def test_files_go_both_ways(world: World) -> None:
    vm = await world.created("on", start=True)
    pieces = await world.operations.vms.read_file(SYSTEM, "on", "/etc/hosts")
    assert [piece async for piece in pieces] == [b"piece"]
    assert await world.operations.vms.write_file(SYSTEM, "on", "/x", content(), 0o644) == 3
    assert ("write_file", vm.meta.id, "/x", 0o644) in world.services.calls
