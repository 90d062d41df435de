from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.api.world import World, ask, finish_task
from undercroft.api import streams
from undercroft.client.client import Change, Client
from undercroft.client.raw import Raw
from undercroft.client.streams import Message, messages
from undercroft.model.base import Meta, Ref
from undercroft.model.errors import CompactedError, UndercroftError
from undercroft.model.event import Event
from undercroft.model.names import new_id
from undercroft.model.requests import VMChange, VMCreate
from undercroft.model.task import TaskState
from undercroft.model.vm import VM
from undercroft.store.interface import Delete, Put, Transaction


def event(name: str, message: str = "it happened") -> Event:
    return Event(
        meta=Meta(id=new_id("event"), name="e", created=1.0),
        type="test.done",
        object=Ref(kind="vm", id=new_id("vm"), name=name),
        message=message,
    )


async def emit(world: World, *events: Event) -> int:
    return await world.store.transact(Transaction(puts=[Put(item) for item in events]))


class Reader:
    """Reads a stream in a thread, one message at a time."""

    def __init__(self, world: World, path: str, **headers: str) -> None:
        self.raw = Raw(world.endpoint, timeout=20.0)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = self.raw.request("GET", path, headers=names)
        self.messages: Iterator[Message] = messages(self.response)

    def close(self) -> None:
        self.response.close()
        self.raw.close()


@contextlib.asynccontextmanager
async def reading(world: World, path: str, **headers: str) -> AsyncIterator[Reader]:
    reader = await asyncio.to_thread(Reader, world, path, **headers)
    try:
        yield reader
    finally:
        await asyncio.to_thread(reader.close)


async def following(reader: Reader) -> Message | None:
    return await asyncio.to_thread(next, reader.messages, None)


async def test_events_as_they_happen(world: World) -> None:
    async with reading(world, "/v1/events/stream") as reader:
        start = await following(reader)
        assert start is not None
        assert start.event == "start"
        assert json.loads(start.data)["revision"] == int(start.id)
        revision = await emit(world, event("web1"), event("web2"))
        first, second = await following(reader), await following(reader)
        assert first is not None
        assert second is not None
        assert [json.loads(m.data)["object"]["name"] for m in (first, second)] == ["web1", "web2"]
        # Cut between the two, the whole transaction would have to come again.
        assert int(first.id) < revision
        assert int(second.id) == revision


async def test_a_stream_goes_on_where_it_was_cut(world: World) -> None:
    revisions = [await emit(world, event(f"web{number}")) for number in range(6)]
    async with reading(world, f"/v1/events/stream?after={revisions[0]}") as reader:
        await following(reader)
        seen = [await following(reader) for _ in range(2)]
    position = seen[-1].id if seen[-1] else ""
    assert position == str(revisions[2])
    # Last-Event-ID is newer than what the address still says.
    path = f"/v1/events/stream?after={revisions[0]}"
    async with reading(world, path, last_event_id=position) as reader:
        await following(reader)
        rest = [await following(reader) for _ in range(3)]
    assert [int(message.id) for message in rest if message] == revisions[3:]


async def test_events_about_one_object(world: World) -> None:
    async with reading(world, "/v1/events/stream?object=web2") as reader:
        await following(reader)
        await emit(world, event("web1"))
        await emit(world, event("web2", "a\nb\r\nc: d"))
        message = await following(reader)
        assert message is not None
        assert json.loads(message.data)["message"] == "a\nb\r\nc: d"


async def test_watch_tells_writing_and_removing(world: World) -> None:
    async with reading(world, "/v1/watch?kinds=vm") as reader:
        await following(reader)
        (vm,) = await world.add_vms(1)
        revision = await world.store.transact(Transaction(deletes=[Delete(VM, vm.meta.id)]))
        written, removed = await following(reader), await following(reader)
        assert written is not None
        assert removed is not None
        assert json.loads(written.data)["record"]["meta"]["name"] == "web0"
        assert json.loads(removed.data) == {
            "kind": "vm",
            "id": vm.meta.id,
            "revision": revision,
            "record": None,
        }


async def test_the_client_watches(world: World) -> None:
    (vm,) = await world.add_vms(1)
    revision = await world.store.revision()
    task = await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))
    await ask(world, lambda c: c.vms.set("web0", VMChange(cpus=3)))

    def work(client: Client) -> list[Change[Any]]:
        found = []
        for change in client.watch("vm", "task", from_revision=revision):
            found.append(change)
            if len(found) == 3:
                return found
        return found

    found = await ask(world, work)
    kinds = [(change.kind, change.id) for change in found]
    assert set(kinds[:2]) == {("vm", task.spec.object.id), ("task", task.meta.id)}
    assert kinds[2] == ("vm", vm.meta.id)
    assert isinstance(found[2].record, VM)
    assert found[2].record.spec.cpus == 3

    def one(client: Client) -> Change[Any]:
        return next(client.watch("vm", from_revision=revision, id=vm.meta.id))

    assert (await ask(world, one)).id == vm.meta.id


async def test_history_that_is_gone(world: World) -> None:
    for number in range(10):
        await emit(world, event(f"web{number}"))
    await world.store.compact(2)
    with pytest.raises(CompactedError):
        await ask(world, lambda c: next(c.watch("event", from_revision=1)))
    with pytest.raises(CompactedError):
        await ask(world, lambda c: next(c.events.follow(after=1)))
    with pytest.raises(CompactedError):  # a store that was replaced has never been that far
        await ask(world, lambda c: next(c.events.follow(after=10**9)))


async def test_a_heartbeat(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "HEARTBEAT", 0.05)

    def work() -> list[bytes]:
        with Raw(world.endpoint) as raw:
            lines = raw.request("GET", "/v1/watch").lines()
            found: list[bytes] = []
            while found.count(b": ") < 2:
                found.append(next(lines))
            return found

    assert b": " in await asyncio.wait_for(asyncio.to_thread(work), 20)


async def test_whoever_goes_leaves_nothing_behind(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = len(asyncio.all_tasks())
    for _ in range(3):
        async with reading(world, "/v1/watch") as reader:
            await following(reader)
            assert world.server.statistics.open_streams == 1
    for _ in range(200):
        if world.server.statistics.open_streams == 0 and len(asyncio.all_tasks()) <= tasks:
            break
        await asyncio.sleep(0.02)
    assert world.server.statistics.open_streams == 0
    assert len(asyncio.all_tasks()) <= tasks


async def test_a_slow_reader_costs_no_memory_and_loses_nothing(world: World) -> None:
    count, size = 300, 60_000
    start = await world.store.revision()
    connection = socket.socket(socket.AF_UNIX)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await asyncio.to_thread(connection.connect, str(world.directory.socket))
    with connection:
        head = f"GET /v1/events/stream?after={start} HTTP/1.1\r\nhost: x\r\n\r\n"
        await asyncio.to_thread(connection.sendall, head.encode())
        for number in range(count):
            await emit(world, event(f"web{number}", "x" * size))
        await asyncio.sleep(0.3)
        (held,) = world.server._state.connections
        waiting = held.transport.get_write_buffer_size()
        assert waiting < 20 * size, "what a slow reader does not take piles up"

        def rest() -> bytes:
            connection.settimeout(20)
            data = bytearray()
            while b'"web%d"' % (count - 1) not in data[-2 * size :]:
                data += connection.recv(1 << 20)
            return bytes(data)

        data = await asyncio.to_thread(rest)
    assert all(b'"web%d"' % number in data for number in range(count))


async def test_streams_end_with_the_daemon(world: World) -> None:
    async with reading(world, "/v1/watch") as reader:
        await following(reader)
        began = asyncio.get_running_loop().time()
        await world.server.stop()
        assert await following(reader) is None, "the stream ends as a stream should"
        assert asyncio.get_running_loop().time() - began < 5


async def test_a_client_survives_a_restart_of_the_daemon(world: World) -> None:
    from undercroft.api.server import ApiServer

    revision = await emit(world, event("before"))

    def work(client: Client) -> list[str]:
        found = []
        for item in client.events.follow(after=revision - 1):
            found.append(item.object.name)
            if item.object.name == "after":
                return found
        return found

    reading = asyncio.ensure_future(ask(world, work))
    await asyncio.sleep(0.3)
    await world.server.stop()
    await emit(world, event("meanwhile"))
    world.server = ApiServer(world.operations, world.directory)
    await world.server.start()
    await emit(world, event("after"))
    assert await asyncio.wait_for(reading, 30) == ["before", "meanwhile", "after"]


async def test_progress_of_a_task_is_followed(world: World) -> None:
    task = await ask(world, lambda c: c.vms.create(VMCreate(name="x", disk=1 << 30)))

    async def finish() -> None:
        await asyncio.sleep(0.1)
        for state in (TaskState.RUNNING, TaskState.SUCCEEDED):
            await finish_task(world, task.meta.id, state)

    finishing = asyncio.ensure_future(finish())
    states: list[str] = []
    await ask(world, lambda c: c.tasks.wait(task, progress=lambda t: states.append(t.status.state)))
    await finishing
    assert states == ["pending", "running", "succeeded"]


async def test_a_failing_store_is_told_in_the_stream(tmp_path: Path) -> None:
    async def broken() -> AsyncIterator[Any]:
        await asyncio.sleep(0.2)
        raise UndercroftError("the disk is gone")
        yield

    follower = streams.Follower(broken(), lambda _: [], asyncio.Event(), 5)
    await follower.prepare()
    found = b"".join([piece async for piece in follower])
    assert b"id: 5\nevent: start\n" in found
    problem = found.split(b"event: error\ndata: ")[1].strip()
    assert msgspec.json.decode(problem)["detail"] == "the disk is gone"


def test_messages_of_a_stream() -> None:
    class Lines:
        def lines(self) -> Iterator[bytes]:
            text = (
                b"retry: 1\n\n: comment\nid: 1\ndata: a\ndata:b\n\ndata\n\nevent: x\nid: 2\n\n"
                b"event: y\ndata: \xff\n\nid: 3\ndata: unfinished"
            )
            yield from text.split(b"\n")

    found = list(messages(Lines()))  # type: ignore[arg-type]
    assert found == [
        Message("1", "message", "a\nb"),
        Message("1", "message", ""),
        Message("2", "y", "\N{REPLACEMENT CHARACTER}"),
    ]
