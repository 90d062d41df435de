"""The guest agent of a real guest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from tests.system.hypervisor.lab import Guest, Lab, eventually
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.model.errors import GuestAgentError, TimeLimitError


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


async def with_agent(lab: Lab) -> tuple[Guest, GuestAgent]:
    guest = await lab.boot()
    agent = guest.machine.agent
    assert agent is not None
    await eventually(agent.ping)
    await guest.settled()
    return guest, agent


async def test_programs_and_files(lab: Lab) -> None:
    guest, agent = await with_agent(lab)
    result = await agent.exec(["sh", "-c", "cat; echo $WORD; echo no >&2; exit 3"],
                              input=b"in ", env={"WORD": "a b"})  # fmt: skip
    assert (result.exit_code, result.stdout, result.stderr) == (3, b"in a b\n", b"no\n")
    assert (await agent.exec(["sh", "-c", "kill -9 $$"])).signal == 9
    with pytest.raises(GuestAgentError, match="nonesuch"):
        await agent.exec(["nonesuch"])
    with pytest.raises(TimeLimitError):
        await agent.exec(["sleep", "4711"], timeout=1)
    assert await guest.run("sleep 1; pidof sleep || echo none") == "none"

    several = await asyncio.gather(*(agent.exec(["echo", str(n)]) for n in range(10)))
    assert [result.stdout for result in several] == [f"{n}\n".encode() for n in range(10)]

    data = os.urandom(1_000_003)
    assert await agent.write_file("/tmp/file", pieces(data, 300_000), 0o640) == len(data)
    assert b"".join([piece async for piece in agent.read_file("/tmp/file")]) == data
    assert await guest.run("stat -c %a /tmp/file") == "640"
    with pytest.raises(GuestAgentError):
        [piece async for piece in agent.read_file("/nowhere")]
    assert await agent.write_file("/tmp/empty", pieces(b"", 1)) == 0
    assert [piece async for piece in agent.read_file("/tmp/empty")] == []


async def test_no_agent_is_said_at_once(lab: Lab) -> None:
    guest, agent = await with_agent(lab)
    await guest.run("mv /sbin/qemu-ga /sbin/gone 2> /dev/null || mv $(which qemu-ga) /sbin/gone")
    await guest.run("killall -9 qemu-ga")
    await eventually(lambda: agent.channel.present is False)
    with pytest.raises(GuestAgentError, match="no guest agent runs"):
        await asyncio.wait_for(agent.exec(["true"]), 2)
    assert not await agent.ping()
