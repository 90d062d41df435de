"""The helper that waits in a guest, as a program of this machine."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.hypervisor.helper import LARGEST, Batch, GuestHelper, program, start_script
from undercroft.model.errors import GuestAgentError, TimeLimitError

HERE = files("undercroft.hypervisor")
native = pytest.mark.skipif(platform.machine() != "x86_64", reason="a program for x86-64")
WRITE, OPEN, CLOSE, GETPID, RENAME = 1, 2, 3, 39, 82
O_RDWR_CREAT = os.O_RDWR | os.O_CREAT


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("ld")), reason="needs binutils")
@native
def test_the_bytes_are_those_of_the_source(tmp_path: Path) -> None:
    source, half, binary = tmp_path / "helper.s", tmp_path / "helper.o", tmp_path / "helper.bin"
    source.write_text(HERE.joinpath("guesthelper.s").read_text())
    subprocess.run(["as", "--64", "-o", half, source], check=True)
    link = ["ld", "-m", "elf_x86_64", "-n", "-s", "-z", "noseparate-code"]
    subprocess.run([*link, "-o", binary, half], check=True)
    assert binary.read_bytes() == program()


class Running:
    """A helper that runs here, with a socket for a port."""

    def __init__(self, directory: Path) -> None:
        path = directory / "helper"
        path.write_bytes(program())
        path.chmod(0o700)
        self.ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen([str(path)], stdin=theirs.fileno())
        self.ours.setblocking(False)
        self.helper = GuestHelper("vm test", self.ours)

    async def run(self, batch: Batch) -> list[int]:
        await self.helper.send(batch)
        return await self.helper.receive(batch, 10)

    def end(self) -> None:
        self.helper.close()
        assert self.process.wait(10) == 0


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    running = Running(tmp_path)
    yield running
    running.end()


@native
async def test_calls_are_carried_out_in_order_and_use_what_others_returned(
    running: Running, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    batch = Batch()
    file = batch.call(OPEN, os.fsencode(path) + b"\0", O_RDWR_CREAT, 0o600)
    batch.call(WRITE, file, b"one", 3)
    batch.call(WRITE, file, b" two", 4)
    batch.call(CLOSE, file)
    batch.call(OPEN, b"/not/there\0", 0)
    batch.call(GETPID)
    opened, one, two, closed, missing, pid = await running.run(batch)
    assert opened > 2
    assert (one, two, closed) == (3, 4, 0)
    assert missing == -2
    assert pid == running.process.pid
    assert path.read_bytes() == b"one two"


@native
async def test_a_batch_in_pieces_and_several_in_a_row(running: Running, tmp_path: Path) -> None:
    for number in range(3):
        path = tmp_path / f"file{number}"
        batch = Batch()
        file = batch.call(OPEN, os.fsencode(path) + b"\0", O_RDWR_CREAT, 0o600)
        batch.call(WRITE, file, b"x" * 5000, 5000)
        batch.call(CLOSE, file)
        encoded = batch.encode()
        for begin in range(0, len(encoded), 777):
            running.ours.setblocking(True)
            running.ours.sendall(encoded[begin : begin + 777])
        running.ours.setblocking(False)
        assert (await running.helper.receive(batch, 10))[1:] == [5000, 0]
        assert path.stat().st_size == 5000


@native
async def test_nonsense_ends_it(tmp_path: Path) -> None:
    running = Running(tmp_path)
    running.ours.send((LARGEST + 1).to_bytes(4, "little") + bytes(4))
    assert running.process.wait(10) == 0
    with pytest.raises(GuestAgentError, match="gone"):
        await running.helper.receive(_one_call(), 10)
    running.helper.close()


async def test_no_answer_is_not_waited_for_for_ever() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs, pytest.raises(TimeLimitError):
        await GuestHelper("vm test", ours).receive(_one_call(), 0.01)


def _one_call() -> Batch:
    batch = Batch()
    batch.call(GETPID)
    return batch


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_offsets_lead_to_the_data(contents: list[bytes]) -> None:
    batch = Batch()
    for content in contents:
        batch.call(WRITE, 5, content, len(content))
    encoded = batch.encode()
    assert int.from_bytes(encoded[:4], "little") == len(encoded)
    for number, content in enumerate(contents):
        call = encoded[8 + 64 * number :][:64]
        offset = int.from_bytes(call[16:24], "little")
        assert encoded[offset : offset + len(content)] == content
        assert call[56] == 0b10


def test_a_batch_that_is_too_large_is_refused() -> None:
    batch = Batch()
    batch.call(WRITE, 1, bytes(LARGEST), LARGEST)
    with pytest.raises(ValueError, match="too large"):
        batch.encode()


@native
def test_the_script_writes_the_program(tmp_path: Path) -> None:
    octal = start_script().split("printf '")[1].split("'")[0]
    printed = subprocess.run(["sh", "-c", f"printf '{octal}'"], capture_output=True, check=True)
    assert printed.stdout == program()
