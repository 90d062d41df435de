"""The guest's side of the agent channel played by somebody who means ill."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from undercroft.hypervisor import sockets
from undercroft.hypervisor.guestagent import GuestAgent
from undercroft.model.errors import GuestAgentError, NoProgramError, TimeLimitError

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter
Answer = Callable[[dict[str, Any], Writer], Awaitable[None]]


class Impostor:
    """Listens where QEMU would, and answers as told. It synchronises properly."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.connections = 0
        self.commands: list[str] = []
        self.greeting = b""

    async def serve(self, reader: Reader, writer: Writer) -> None:
        self.connections += 1
        writer.write(self.greeting)
        try:
            while line := await reader.readline():
                request = json.loads(line.lstrip(b"\xff"))
                if request["execute"] == "guest-sync-delimited":
                    say(writer, {"return": request["arguments"]["id"]}, b"\xff")
                else:
                    self.commands.append(request["execute"])
                    await self.answer(request, writer)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()


def say(writer: Writer, answer: Any, prefix: bytes = b"") -> None:
    writer.write(prefix + json.dumps(answer).encode() + b"\n")


@pytest.fixture
async def impostor(tmp_path: Path) -> AsyncIterator[Callable[[Answer], Awaitable[Impostor]]]:
    servers = []

    async def start(answer: Answer) -> Impostor:
        player = Impostor(answer)
        listener = sockets.listen(tmp_path / "agent.sock")
        servers.append(await asyncio.start_unix_server(player.serve, sock=listener))
        return player

    yield start
    for server in servers:
        server.close()


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[GuestAgent]:
    agent = GuestAgent("web1", tmp_path / "agent.sock")
    yield agent
    await agent.close()


Start = Callable[[Answer], Awaitable[Impostor]]


async def test_talk_that_never_ends_a_line(impostor: Start, agent: GuestAgent) -> None:
    async def babble(request: dict[str, Any], writer: Writer) -> None:
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()

    await impostor(babble)
    with pytest.raises(GuestAgentError, match="more than 1048576 bytes"):
        await agent.addresses()


@pytest.mark.parametrize(
    "answer",
    [b"nonsense\n", b"[]\n", b"{}\n", b"\xff\xfe\n", b'{"return"\n', b"[" * 100000 + b"\n"],
)
async def test_nonsense(impostor: Start, agent: GuestAgent, answer: bytes) -> None:
    async def speak(request: dict[str, Any], writer: Writer) -> None:
        writer.write(answer)

    player = await impostor(speak)
    for _ in range(2):
        with pytest.raises(GuestAgentError, match="nonsense"):
            await agent.addresses()
    assert player.connections == 2  # trusted again only after another synchronisation


@pytest.mark.parametrize(
    "result",
    [
        "text",
        [{"name": 5}],
        [{"name": "eth0", "ip-addresses": [{"ip-address": "$(reboot)"}]}],
        {"a": 1},
    ],
)
async def test_answers_of_the_wrong_shape(impostor: Start, agent: GuestAgent, result: Any) -> None:
    async def speak(request: dict[str, Any], writer: Writer) -> None:
        say(writer, {"return": result})

    await impostor(speak)
    with pytest.raises(GuestAgentError, match="nonsense"):
        await agent.addresses()


async def test_silence(impostor: Start, agent: GuestAgent) -> None:
    async def nothing(request: dict[str, Any], writer: Writer) -> None:
        pass

    await impostor(nothing)
    assert not await agent.ping(timeout=0.2)
    with pytest.raises(TimeLimitError):
        await agent.addresses(timeout=0.2)


async def test_leftovers_are_skipped(impostor: Start, agent: GuestAgent) -> None:
    """What an earlier conversation left in the channel is not taken for an answer."""

    async def speak(request: dict[str, Any], writer: Writer) -> None:
        say(writer, {"return": []})

    player = await impostor(speak)
    player.greeting = b'{"return": "old"}\n\xff{"return": 1}\nhalf a li'
    assert await agent.addresses() == ()


async def test_late_answer_is_not_the_next_ones(impostor: Start, agent: GuestAgent) -> None:
    async def late(request: dict[str, Any], writer: Writer) -> None:
        if request["execute"] == "guest-network-get-interfaces":
            await asyncio.sleep(0.3)
        say(writer, {"return": {} if request["execute"] == "guest-ping" else []})

    await impostor(late)
    with pytest.raises(TimeLimitError):
        await agent.addresses(timeout=0.1)
    assert await agent.ping()


async def test_refusal_is_passed_on_and_bounded(impostor: Start, agent: GuestAgent) -> None:
    async def refuse(request: dict[str, Any], writer: Writer) -> None:
        say(writer, {"error": {"class": "GenericError", "desc": "no " * 10000}})

    player = await impostor(refuse)
    with pytest.raises(GuestAgentError, match="refused guest-exec") as caught:
        await agent.exec(["true"])
    assert len(caught.value.message) < 1000
    with pytest.raises(GuestAgentError):
        await agent.exec(["true"])
    assert player.connections == 1  # a refusal is an answer like any other


async def test_output_is_decoded_strictly(impostor: Start, agent: GuestAgent) -> None:
    async def speak(request: dict[str, Any], writer: Writer) -> None:
        if request["execute"] == "guest-exec":
            say(writer, {"return": {"pid": 1}})
        else:
            say(writer, {"return": {"exited": True, "exitcode": 0, "out-data": "!!"}})

    await impostor(speak)
    with pytest.raises(GuestAgentError, match="nonsense"):
        await agent.exec(["true"])


async def test_writes_that_claim_too_much(impostor: Start, agent: GuestAgent) -> None:
    async def speak(request: dict[str, Any], writer: Writer) -> None:
        answers = {"guest-file-open": 7, "guest-file-write": {"count": 999, "eof": False}}
        say(writer, {"return": answers.get(request["execute"], {})})

    async def content() -> AsyncIterator[bytes]:
        yield b"abc"

    player = await impostor(speak)
    with pytest.raises(GuestAgentError, match="nonsense"):
        await agent.write_file("/x", content())
    assert player.commands[-1] == "guest-file-close"


async def test_shares_of_the_whole_are_put_together(impostor: Start, agent: GuestAgent) -> None:
    """An agent that writes a few bytes at a time."""
    taken = bytearray()

    async def speak(request: dict[str, Any], writer: Writer) -> None:
        match request["execute"]:
            case "guest-file-open":
                say(writer, {"return": 7})
            case "guest-file-write":
                data = base64.b64decode(request["arguments"]["buf-b64"])[:3]
                taken.extend(data)
                say(writer, {"return": {"count": len(data), "eof": False}})
            case _:
                say(writer, {"return": {}})

    async def content() -> AsyncIterator[bytes]:
        yield b"abcd"
        yield b"efghij"

    await impostor(speak)
    assert await agent.write_file("/x", content()) == 10
    assert bytes(taken) == b"abcdefghij"


async def test_nobody_listens(agent: GuestAgent) -> None:
    assert not await agent.ping()
    with pytest.raises(GuestAgentError, match="broken"):
        await agent.addresses()


async def test_hanging_up(impostor: Start, agent: GuestAgent) -> None:
    async def hang_up(request: dict[str, Any], writer: Writer) -> None:
        writer.close()

    await impostor(hang_up)
    with pytest.raises(GuestAgentError):
        await agent.addresses()


@pytest.mark.parametrize("argv", [[], ["a\0b"]])
async def test_no_command(agent: GuestAgent, argv: list[str]) -> None:
    with pytest.raises(GuestAgentError):
        await agent.exec(argv)


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("No such file or directory", "there is no program lsblk in vm web1"),
        ("Permission denied", "lsblk in vm web1 cannot be run: Permission denied"),
    ],
)
async def test_a_program_that_is_not_there(
    impostor: Start, agent: GuestAgent, reason: str, text: str
) -> None:
    async def refuse(request: dict[str, Any], writer: Writer) -> None:
        detail = f"Failed to execute child process “lsblk” ({reason})"
        say(writer, {"error": {"class": "GenericError", "desc": detail}})

    await impostor(refuse)
    with pytest.raises(NoProgramError) as caught:
        await agent.exec(["lsblk"])
    assert (caught.value.message, caught.value.code) == (text, "no-program")
