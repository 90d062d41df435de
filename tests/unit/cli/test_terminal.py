"""The user's terminal comes back as it was; a guest's output cannot harm it."""

import os
import pty
import signal
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.cli.errors import Ended
from undercroft.cli.terminal import PlainText, key_name, parse_key, raw


@pytest.fixture
def terminal():
    main, user = pty.openpty()
    yield user
    os.close(main)
    os.close(user)


def settings(descriptor: int) -> list[object]:
    return termios.tcgetattr(descriptor)[:4]


def test_raw_mode_and_back(terminal):
    before = settings(terminal)
    with raw(terminal):
        assert not settings(terminal)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)  # type: ignore[operator]
    assert settings(terminal) == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_back_whatever_happens(terminal, error):
    before = settings(terminal)
    with pytest.raises(error), raw(terminal):
        raise error
    assert settings(terminal) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_back_when_a_signal_ends_croft(terminal, number):
    before, handler = settings(terminal), signal.getsignal(number)
    with pytest.raises(Ended) as caught, raw(terminal):
        signal.raise_signal(number)
    assert caught.value.code == 128 + number
    assert settings(terminal) == before
    assert signal.getsignal(number) is handler


def plain(*pieces: bytes) -> bytes:
    text = PlainText()
    return b"".join(text.feed(piece) for piece in pieces) + text.end()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"hello\r\nworld\n", b"hello\nworld\n"),
        (b"\x1b[0;1;31mred\x1b[0m", b"red"),
        (b"\x1b]0;title\x07x\x1b]52;c;AAAA\x1b\\y", b"xy"),
        (b"\x1bPquery\x1b\\z", b"z"),
        (b"\x1b[6n\x1b[2J\x1b(Bok\x1bc", b"ok"),
        (b"10%\r20%\r\n", b"10%\n20%\n"),
        (b"a\x08\x00\x07b\tc", b"ab\tc"),
        ("ä→".encode(), "ä→".encode()),
    ],
)
def test_plain_text(data, text):
    assert plain(data) == text


@given(
    st.lists(
        st.sampled_from([b"\x1b", b"[", b"]", b"0m", b"x", b"\r", b"\n", b"\x07", b"\\", b";"])
    )
)
def test_plain_text_is_the_same_however_it_arrives(pieces):
    whole = b"".join(pieces)
    assert plain(*pieces) == plain(whole)
    assert b"\x1b" not in plain(whole)


@pytest.mark.parametrize(
    ("text", "code"), [("^]", 0x1D), ("ctrl-o", 15), ("Ctrl-A", 1), ("^\\", 28)]
)
def test_keys(text, code):
    assert parse_key(text) == code


@pytest.mark.parametrize("text", ["", "x", "^", "^xx", "ctrl-ä", "^1"])
def test_no_keys(text):
    with pytest.raises(ValueError):
        parse_key(text)


def test_names_of_keys():
    assert key_name(0x1D) == "Ctrl-]"
