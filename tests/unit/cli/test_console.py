"""What passes between terminal and console."""

import os
import socket
import threading
from collections.abc import Iterator
from typing import Any, cast

import pytest

from undercroft.cli import console
from undercroft.cli.console import _relay, _Seen


class FakeWebSocket:
    """A console on a socket pair: what a test sends to ``far`` is what the guest says."""

    def __init__(self) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.typed = b""

    def fileno(self) -> int:
        return self.near.fileno()

    def receive(self, timeout: float | None = None) -> bytes | None:
        try:
            return self.near.recv(65536) or None
        except BlockingIOError:
            return b""

    def send(self, data: bytes) -> None:
        self.typed += data


@pytest.fixture
def guest() -> Iterator[FakeWebSocket]:
    fake = FakeWebSocket()
    yield fake
    fake.near.close()
    fake.far.close()


@pytest.fixture
def keys() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    yield read, write
    os.close(read)


def relay(guest: FakeWebSocket, *arguments: Any, **options: Any) -> bool:
    return _relay(cast(Any, guest), *arguments, **options)


def test_the_escape_key_leaves_and_what_was_typed_before_arrives(guest, keys, capfd):
    os.write(keys[1], b"ls\r\x1drm -rf /\r")
    assert relay(guest, keys[0], 0x1D) is True
    assert guest.typed == b"ls\r"
    os.close(keys[1])


def test_other_control_keys_belong_to_the_guest(guest, keys, capfd):
    os.write(keys[1], b"\x03\x1a\x04\x1b[A\x1d")
    assert relay(guest, keys[0], 0x1D) is True
    assert guest.typed == b"\x03\x1a\x04\x1b[A"
    os.close(keys[1])


def test_read_only_sends_nothing(guest, keys, capfd):
    os.write(keys[1], b"abc\x1d")
    assert relay(guest, keys[0], 0x1D, read_only=True) is True
    assert guest.typed == b""
    os.close(keys[1])


def test_output_as_it_is_until_the_console_ends(guest, keys, capfdbinary):
    guest.far.sendall(b"\x00\xff\x1b[1mhello")
    guest.far.shutdown(socket.SHUT_WR)
    assert relay(guest, keys[0], 0x1D) is False
    assert capfdbinary.readouterr().out == b"\x00\xff\x1b[1mhello"
    os.close(keys[1])


def test_the_end_of_a_pipe_waits_for_the_answer(guest, keys, capfd, monkeypatch):
    monkeypatch.setattr(console, "_LINGER", 0.2)
    os.write(keys[1], b"uptime\r")
    os.close(keys[1])
    timer = threading.Timer(0.1, guest.far.sendall, [b"up 3 days"])
    timer.start()
    assert relay(guest, keys[0], None) is True
    timer.join()
    assert guest.typed == b"uptime\r"
    assert capfd.readouterr().out == "up 3 days"


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([b"plain"], False),
        ([b"x\x1b[?1049h", b"editor"], True),
        ([b"\x1b[?1049h", b"\x1b[?1049l"], False),
        ([b"\x1b[?1049l\x1b[?1049h"], True),
    ],
)
def test_whether_a_program_has_taken_the_screen(pieces, expected):
    seen = _Seen()
    for piece in pieces:
        seen.look(piece)
    assert seen.alternate_screen is expected
