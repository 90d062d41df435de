"""The host as operations see it."""

from __future__ import annotations

import asyncio
import socket
from typing import Any, cast

import pytest

from tests.unit.host.rig import Rig
from undercroft.host.services import READ_SIZE, LocalHost, SocketStream
from undercroft.model.errors import GuestAgentError, QmpError, WrongStateError
from undercroft.model.requests import CheckReport, ExecRequest, VMCreate
from undercroft.operations.access import SYSTEM
from undercroft.operations.images import _UPLOAD


async def pair() -> tuple[SocketStream, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return await SocketStream.open(ours), theirs


async def test_bytes_go_both_ways() -> None:
    stream, other = await pair()
    await stream.write(b"RFB 003.008\n")
    assert other.recv(100) == b"RFB 003.008\n"
    other.sendall(b"hello")
    assert await stream.read() == b"hello"
    other.close()
    assert await stream.read() == b""
    await stream.close()
    await stream.close()


async def test_closing_ends_what_waits() -> None:
    stream, other = await pair()
    waiting = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        await stream.close()
        assert await waiting == b""
    other.close()


async def test_a_slow_reader_holds_the_writer_back() -> None:
    stream, other = await pair()
    writing = asyncio.create_task(stream.write(bytes(8 << 20)))
    await asyncio.sleep(0.02)
    assert not writing.done()

    def drain() -> int:
        size = 0
        while size < 8 << 20:
            size += len(other.recv(READ_SIZE))
        return size

    assert await asyncio.to_thread(drain) == 8 << 20
    await writing
    await stream.close()
    other.close()


async def test_writing_to_one_who_is_gone() -> None:
    stream, other = await pair()
    other.close()

    async def insist() -> None:
        for _ in range(1000):
            await stream.write(b"x" * READ_SIZE)
            await asyncio.sleep(0)

    with pytest.raises(WrongStateError):
        await insist()
    await stream.close()


async def running(rig: Rig) -> Any:
    request = VMCreate(name="web1", start=True)
    await rig.final(await rig.world.operations.vms.create(SYSTEM, request))
    return await rig.world.vm("web1")


def local(rig: Rig) -> LocalHost:
    async def check(repair: bool) -> CheckReport:
        return CheckReport()

    def machine_of(id: str) -> Any:
        return rig.actor(id).machine

    return LocalHost(rig.environment, machine_of, check, lambda template: [])


async def test_samples_leave_out_what_does_not_answer(rig: Rig) -> None:
    vm = await running(rig)
    host = local(rig)
    assert [(s.vm, s.name) for s in await host.samples()] == [(vm.meta.id, "web1")]
    machine = rig.hypervisor.machine
    for failure in (QmpError("no"), ProcessLookupError()):

        async def fail(failure: Exception = failure) -> Any:
            raise failure

        cast(Any, machine).stats = fail
        assert await host.samples() == []


async def test_what_does_not_run_or_has_no_agent(rig: Rig) -> None:
    vm = await running(rig)
    host = local(rig)
    cast(Any, rig.hypervisor.machine).agent = None
    with pytest.raises(GuestAgentError):
        await host.exec(vm, ExecRequest(argv=("id",)))
    rig.hypervisor.machine.ends("guest-shutdown")
    await rig.until("web1", lambda v: not v.status.state.alive)
    for call in (host.screenshot, host.vnc):
        with pytest.raises(WrongStateError, match="not running"):
            await call(vm)
    assert await host.log(vm, 100) == b""


async def test_uploads_have_paths_that_operations_take(rig: Rig) -> None:
    paths = {local(rig).upload_path("../../x") for _ in range(10)}
    assert len(paths) == 10
    for path in paths:
        assert path.parent == rig.environment.tmp
        assert _UPLOAD.fullmatch(path.name)
