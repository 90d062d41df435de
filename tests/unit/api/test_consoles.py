from __future__ import annotations

import asyncio
import json
import socket

import pytest

from tests.unit.api.world import World, ask
from undercroft.client.client import Client
from undercroft.client.websocket import WebSocket
from undercroft.model.errors import (
    DaemonError,
    NotFoundError,
    UndercroftError,
    WrongStateError,
)
from undercroft.model.vm import VMState


async def until(condition: object, seconds: float = 10.0) -> None:
    """Waits until a function says yes."""
    assert callable(condition)
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


async def opened(world: World, scrollback: int = 0) -> WebSocket:
    return await ask(world, lambda c: c.vms.console("web0", scrollback))


def collect(socket: WebSocket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = socket.receive(10.0)
        assert piece, "the console is silent"
        data += piece
    return data


async def test_a_console_hears_and_speaks(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world, scrollback=5)

    def work() -> None:
        assert collect(console, 5) == b"xxxxx"
        console.send(b"\x00\xff\r\n\x1b[A")
        assert collect(console, 7) == b"\x00\xff\r\n\x1b[A"
        assert console.receive(0.05) == b"", "nothing came, and that is told"
        assert console.receive(0) == b""
        console.close()

    await asyncio.to_thread(work)
    await until(world.host.consoles[0].closed.is_set)
    assert world.server.statistics.requests[("WEBSOCKET", "/v1/vms/{ref}/console", 101)] == 1


async def test_much_goes_both_ways(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)
    data = bytes(range(256)) * 12_000

    def work() -> bytes:
        found = b""
        for start in range(0, len(data), 100_000):
            console.send(data[start : start + 100_000])
            found += collect(console, min(100_000, len(data) - start))
        console.close()
        return found

    assert await asyncio.to_thread(work) == data


async def test_the_console_ends(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)

    def work() -> None:
        console.send(b"quit")
        assert console.receive(10.0) is None
        assert (console.close_code, console.close_reason) == (1000, "the console ended")
        with pytest.raises(DaemonError):
            console.send(b"more")
        console.close()

    await asyncio.to_thread(work)
    assert world.host.consoles[0].closed.is_set()


async def test_a_console_that_fails_tells_why(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)

    async def fail(data: bytes) -> None:
        raise WrongStateError("the VM has gone away \N{SNOWMAN}" * 10)

    world.host.consoles[0].instead = fail

    def work() -> None:
        console.send(b"x")
        assert console.receive(10.0) is None
        assert console.close_code == 4409
        assert console.close_reason.startswith("the VM has gone away")
        assert len(console.close_reason.encode()) <= 123
        console.close()

    await asyncio.to_thread(work)


async def test_the_daemon_ends(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)
    await asyncio.sleep(0.05)
    await world.server.stop()

    def work() -> None:
        assert console.receive(10.0) is None
        assert console.close_code == 1012
        assert "VM runs on" in console.close_reason
        console.close()

    await asyncio.to_thread(work)
    assert world.host.consoles[0].closed.is_set()


async def test_a_guest_is_not_read_faster_than_its_console_is(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)
    echo = world.host.consoles[0]
    piece = bytes(65536)

    async def flood() -> None:
        while True:
            await echo.queue.put(piece)

    flooding = asyncio.ensure_future(flood())
    first = -1
    while echo.taken != first:  # until everything between the guest and its user is full
        first = echo.taken
        await asyncio.sleep(0.5)
        assert first < 8 << 20, "nobody reads, so the guest has to wait"
    await asyncio.to_thread(collect, console, first + (1 << 20))
    assert echo.taken > first
    flooding.cancel()
    await asyncio.to_thread(console.close)


async def test_a_guest_that_does_not_read_makes_its_user_wait(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)
    echo = world.host.consoles[0]
    going = asyncio.Event()

    async def wait(data: bytes) -> None:
        await going.wait()
        echo.written += len(data)

    echo.instead = wait
    sent = 0

    def work() -> None:
        nonlocal sent
        for _ in range(400):
            console.send(bytes(65536))
            sent += 65536

    working = asyncio.ensure_future(asyncio.to_thread(work))
    await asyncio.sleep(0.7)
    stuck = sent
    assert stuck < 8 << 20, "what the guest does not take must not pile up in the daemon"
    going.set()
    await asyncio.wait_for(working, 30)
    await until(lambda: echo.written == 400 * 65536, 30)
    await asyncio.to_thread(console.close)


async def test_the_display_speaks_rfb(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)

    def work(client: Client) -> None:
        with client.vms.vnc("web0") as display:
            assert collect(display, 12) == b"RFB 003.008\n"
            display.send(b"RFB 003.008\n")
            assert collect(display, 12) == b"RFB 003.008\n"

    await ask(world, work)


async def test_a_console_that_cannot_be_had(world: World) -> None:
    await world.add_vms(1)
    with pytest.raises(NotFoundError, match="none"):
        await ask(world, lambda c: c.vms.console("none"))
    with pytest.raises(WrongStateError) as caught:
        await ask(world, lambda c: c.vms.vnc("web0"))
    assert caught.value.action == "start it: croft start web0"


def upgrade(world: World, path: str, *more: str) -> bytes:
    head = [
        f"GET {path} HTTP/1.1",
        "host: x",
        "connection: Upgrade",
        "upgrade: websocket",
        "sec-websocket-version: 13",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        *more,
    ]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(10)
        connection.connect(str(world.directory.socket))
        connection.sendall(("\r\n".join(head) + "\r\n\r\n").encode())
        data = b""
        while b"\r\n\r\n" not in data or (b"101" not in data[:20] and not data.endswith(b"}")):
            piece = connection.recv(65536)
            if not piece:
                break
            data += piece
        return data


async def test_an_unknown_websocket_is_a_problem(world: World) -> None:
    data = await asyncio.to_thread(upgrade, world, "/v1/nothing")
    head, _, body = data.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404")
    assert b"application/problem+json" in head
    assert json.loads(body)["code"] == "not-found"


async def test_the_subprotocol_that_novnc_wants(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    data = await asyncio.to_thread(
        upgrade, world, "/v1/vms/web0/vnc", "sec-websocket-protocol: base64, binary"
    )
    assert data.startswith(b"HTTP/1.1 101")
    assert b"sec-websocket-protocol: binary" in data.lower()


async def test_a_frame_that_is_too_large_ends_it(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    console = await opened(world)

    def work() -> int | None:
        console._protocol.send_binary(bytes(2 << 20))
        try:
            console._flush()
        except UndercroftError:
            return 1009  # ended while it was being sent
        while console.receive(10.0):
            pass
        console.close()
        return console.close_code

    assert await asyncio.to_thread(work) == 1009
