"""The user's terminal while it belongs to a guest (raw) or answers a question (single keys); it is
put back whatever happens."""

from __future__ import annotations

import os
import re
import signal
import sys
import termios
import tty
from contextlib import contextmanager

from undercroft.cli.errors import Ended

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

_TITLED = ("xterm", "tmux", "screen", "rxvt", "alacritty", "foot", "kitty", "wezterm")
# What a guest's programs may have switched on: attributes, hidden cursor, mouse, bracketed paste,
# application keys, scroll region.
_TIDY = "\x1b[0m\x1b[?25h\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?1l\x1b>"
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)

# ECMA-48: control sequences, strings (titles and the like), and single escapes.
_ESCAPES = re.compile(
    rb"\x1b\[[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-OQ-WYZ\\`-~]"
)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]{0,4096}\x1b?|[ -/]*)?\Z")
_RETURNS = re.compile(rb"\r+\n?")  # a bare one draws a line anew: progress bars
_CONTROLS = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@contextmanager
def raw(descriptor: int) -> Iterator[None]:
    """Raw mode on a terminal while the block runs: every key goes through. It is put back also when
    a signal ends croft."""
    with _changed(descriptor):
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield


@contextmanager
def keys(descriptor: int) -> Iterator[None]:
    """Keys come without Enter while the block runs, Ctrl-C is what it always is. What was typed
    before is dropped: it was no answer."""
    with _changed(descriptor):
        tty.setcbreak(descriptor, termios.TCSAFLUSH)
        yield


@contextmanager
def _changed(descriptor: int) -> Iterator[None]:
    before = termios.tcgetattr(descriptor)
    handlers = {number: signal.signal(number, _end) for number in _SIGNALS}
    try:
        yield
    finally:
        # Keys typed ahead were not meant for the shell: TCSAFLUSH drops them.
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _end(number: int, _frame: Any) -> None:
    raise Ended(number)


@contextmanager
def titled(text: str, environ: Mapping[str, str]) -> Iterator[None]:
    """The window's title while the block runs, where the terminal is known to have one."""
    if not environ.get("TERM", "").startswith(_TITLED):
        yield
        return
    sys.stdout.write(f"\x1b[22;0t\x1b]0;{text}\x07")  # keep the old title, set a new one
    sys.stdout.flush()
    try:
        yield
    finally:
        sys.stdout.write("\x1b[23;0t")
        sys.stdout.flush()


def tidy(alternate_screen: bool) -> None:
    """Takes back what programs in the guest may have done to the terminal."""
    leave = "\x1b[?1049l" if alternate_screen else ""
    sys.stdout.write(f"{leave}{_TIDY}")
    sys.stdout.flush()


def write_all(descriptor: int, data: bytes) -> None:
    """Writes all of it."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


class PlainText:
    """Makes plain text of console output: without escape sequences, which could do things to the
    reader's terminal, and with simple line ends. Takes pieces as they come."""

    def __init__(self) -> None:
        self._rest = b""  # the beginning of an escape sequence
        self._return = b""  # a carriage return that may belong to the line break that follows

    def feed(self, data: bytes) -> bytes:
        """What of the output so far can be shown."""
        data = self._rest + data
        unfinished = _UNFINISHED.search(data)
        cut = unfinished.start() if unfinished else len(data)
        self._rest = data[cut:]
        text = self._return + _ESCAPES.sub(b"", data[:cut])
        kept = text.rstrip(b"\r")
        self._return = b"\r" if len(kept) < len(text) else b""
        return _plain(kept)

    def end(self) -> bytes:
        """What was held back."""
        text = self._return + _ESCAPES.sub(b"", self._rest)
        self._rest = self._return = b""
        return _plain(text)


def _plain(text: bytes) -> bytes:
    text = _RETURNS.sub(b"\n", text)
    return _CONTROLS.sub(b"", text)


def parse_key(text: str) -> int:
    """The byte of a control key written as ``^]`` or ``ctrl-]``.

    Raises:
        ValueError: it is not one.
    """
    key = text.lower().removeprefix("ctrl-").removeprefix("ctrl+").removeprefix("^")
    code = ord(key.upper()) ^ 0x40 if len(key) == 1 else -1
    if key == text.lower() or not 0 <= code < 32:
        raise ValueError(text)
    return code


def key_name(code: int) -> str:
    """How a control key is called: ``Ctrl-]``."""
    return f"Ctrl-{chr(code ^ 0x40)}"
