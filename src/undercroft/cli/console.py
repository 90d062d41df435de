"""A VM's serial console and display, as the person at the keyboard meets them."""

from __future__ import annotations

import os
import select
import sys
import time

from undercroft.cli.command import Command, Namespace, Parser, add_names, size
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import dig
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.cli.context import Croft
    from undercroft.cli.terminal import PlainText
    from undercroft.client.websocket import WebSocket

_ESCAPE = 0x1D  # Ctrl-]
_SCROLLBACK = 8 << 10
_MOST = 1 << 20  # bytes of output that the daemon keeps
_LINGER = 1.0  # seconds of silence after the end of a pipe, before croft leaves


class Console(Command):
    """``croft console VM``"""

    description = """
        Connects your terminal with the VM's serial console, and shows what it said last. Ctrl-]
        leaves; the VM goes on. Several may be connected at once and see the same. Press Enter if
        all is quiet.

        Needs nothing in the guest but a login on its serial port, which tiny, debian:12 and the
        images of the catalogue have.
    """
    examples = (
        ("croft console web1", "Ctrl-] leaves"),
        ("croft console web1 --read-only", "only look"),
        ("croft console web1 --escape ^O", "another key, where Ctrl-] is hard to type"),
        ("echo reboot | croft console web1", "types what comes from a pipe"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument("-r", "--read-only", action="store_true", help="send no keys")
        parser.add_argument(
            "-s",
            "--scrollback",
            type=size,
            default=_SCROLLBACK,
            metavar="SIZE",
            help="how much of what was said before (default: 8K)",
        )
        parser.add_argument("--escape", metavar="KEY", help="the key that leaves: ^O")

    def run(self, croft: Croft, args: Namespace) -> int:
        from undercroft.cli.terminal import parse_key

        try:
            escape = _ESCAPE if args.escape is None else parse_key(args.escape)
        except ValueError:
            raise UsageError(f"{args.escape!r} is not a control key", "write it like ^O") from None
        return attach(croft, args.name, args.scrollback, escape, args.read_only)


def attach(
    croft: Croft,
    name: str,
    scrollback: int = _SCROLLBACK,
    escape: int = _ESCAPE,
    read_only: bool = False,
) -> int:
    """Connects the terminal with a VM's console until the user leaves or it ends."""
    from undercroft.cli.terminal import key_name
    from undercroft.client.websocket import open_websocket

    path = f"/v1/vms/{quote(name)}/console"
    croft.api  # noqa: B018 - starts the daemon where none runs
    params = {"scrollback": max(0, min(scrollback, _MOST))}
    with open_websocket(croft.api.transport, path, params) as socket:
        if not sys.stdin.isatty():
            left = _relay(socket, -1 if read_only else sys.stdin.fileno(), None)
            return OK if left else _ended(croft, name, socket)
        look = ", read only" if read_only else ""
        croft.note(croft.err.paint(f"connected to {name}{look}: {key_name(escape)} leaves", "dim"))
        left = _on_terminal(croft, name, socket, escape, read_only)
        if left:
            croft.note(croft.err.paint(f"\nleft {name}, which goes on", "dim"))
            return OK
        return _ended(croft, name, socket)


def _on_terminal(croft: Croft, name: str, socket: WebSocket, escape: int, read_only: bool) -> bool:
    from undercroft.cli import terminal

    seen = _Seen()
    try:
        with terminal.titled(f"{name} - croft", croft.environ), terminal.raw(sys.stdin.fileno()):
            return _relay(socket, sys.stdin.fileno(), escape, read_only, seen)
    finally:
        if croft.out.tty:
            terminal.tidy(seen.alternate_screen)


class _Seen:
    """What the guest has done to the terminal."""

    def __init__(self) -> None:
        self.alternate_screen = False

    def look(self, data: bytes) -> None:
        on, off = data.rfind(b"\x1b[?1049h"), data.rfind(b"\x1b[?1049l")
        if on != off:
            self.alternate_screen = on > off


def _relay(
    socket: WebSocket,
    source: int,
    escape: int | None,
    read_only: bool = False,
    seen: _Seen | None = None,
) -> bool:
    """Passes bytes both ways; True if the user left, False if the console ended. ``source`` is
    where keys come from (-1: nowhere)."""
    from undercroft.cli.terminal import write_all

    target = sys.stdout.fileno()
    watched = [socket.fileno()] + ([source] if source >= 0 else [])
    silent_since: float | None = None
    while True:
        wait = None
        if silent_since is not None:
            wait = max(0.0, silent_since + _LINGER - time.monotonic())
        ready, _, _ = select.select(watched, [], [], wait)
        if not ready and silent_since is not None:
            return True
        if socket.fileno() in ready:
            while data := socket.receive(0):
                if seen is not None:
                    seen.look(data)
                write_all(target, data)
            if data is None:
                return False
            if silent_since is not None:
                silent_since = time.monotonic()
        if source in ready:
            keys = os.read(source, 4096)
            if not keys:
                watched.remove(source)
                silent_since = time.monotonic()
                continue
            if escape is not None and (cut := keys.find(escape)) >= 0:
                if cut and not read_only:
                    socket.send(keys[:cut])
                return True
            if not read_only:
                socket.send(keys)


def _ended(croft: Croft, name: str, socket: WebSocket) -> int:
    """Says why the console ended."""
    from undercroft.model.errors import UndercroftError

    why = ""
    try:
        vm = croft.api.get(f"/v1/vms/{quote(name)}")
        why = f": it is {dig(vm, 'status.state')}"
        reason = dig(vm, "status.last_exit.reason")
        if reason and dig(vm, "status.instance") is None:
            why += f" ({reason})"
    except UndercroftError:
        if socket.close_reason:
            why = f": {croft.err.clean(socket.close_reason)}"
    croft.note(f"\nthe console of {name} has ended{why}")
    return OK


class Log(Command):
    """``croft log VM``"""

    description = """
        Prints what the VM's serial console said, also while it is stopped; about the last megabyte
        is kept. Escape sequences are taken out, since a guest could do things to your terminal with
        them.
    """
    examples = (
        ("croft log web1", "all that is kept"),
        ("croft log web1 -n 20", "the last lines"),
        ("croft log web1 -f", "and whatever comes; Ctrl-C leaves"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument("-f", "--follow", action="store_true", help="go on as it speaks")
        parser.add_argument("-n", "--lines", type=int, metavar="N", help="only the last N lines")
        parser.add_argument("--raw", action="store_true", help="with its escape sequences")

    def run(self, croft: Croft, args: Namespace) -> int:
        path = f"/v1/vms/{quote(args.name)}/log"
        data = croft.api.request("GET", path, params={"bytes": _MOST}).read()
        if args.lines is not None:
            data = _tail(data, args.lines)
        if args.follow and _follow(croft, args.name, len(data), args.raw):
            return OK
        if not args.raw:
            plain = _plain_text()
            data = plain.feed(data) + plain.end()
        if croft.json:
            croft.print_json({"vm": args.name, "log": data.decode("utf-8", "replace")})
            return OK
        sys.stdout.buffer.write(data if data.endswith(b"\n") or not data else data + b"\n")
        sys.stdout.flush()
        return OK


def _tail(data: bytes, lines: int) -> bytes:
    """The last lines of the data."""
    kept = data.split(b"\n")
    last = 1 if kept[-1] else 2  # what follows the last line break is no line if there is nothing
    return b"\n".join(kept[-lines - last + 1 :]) if lines > 0 else b""


def _follow(croft: Croft, name: str, scrollback: int, raw: bool) -> bool:
    """Prints the last ``scrollback`` bytes of the console, and whatever comes until it ends; False
    if there is no console because the VM does not run."""
    from undercroft.client.websocket import open_websocket
    from undercroft.model.errors import WrongStateError

    plain = None if raw else _plain_text()
    path = f"/v1/vms/{quote(name)}/console"
    try:
        socket = open_websocket(croft.api.transport, path, {"scrollback": scrollback})
    except WrongStateError:
        return False
    with socket:
        try:
            for data in socket:
                sys.stdout.buffer.write(data if plain is None else plain.feed(data))
                sys.stdout.flush()
        except KeyboardInterrupt:
            return True
        _ended(croft, name, socket)
        return True


def _plain_text() -> PlainText:
    from undercroft.cli.terminal import PlainText

    return PlainText()


class Screenshot(Command):
    """``croft screenshot VM FILE``"""

    description = """
        Saves what the VM's display shows as a PNG picture. VMs without a display (--display none,
        microvm) have none.
    """
    examples = (
        ("croft screenshot web1 shot.png", "into a file"),
        ("croft screenshot web1 - | feh -", "to another program"),
    )

    def arguments(self, parser: Parser) -> None:
        add_names(parser, plural=False)
        parser.add_argument(
            "file", nargs="?", metavar="FILE", help="(default: VM.png; - writes to stdout)"
        )

    def run(self, croft: Croft, args: Namespace) -> int:
        target = args.file or f"{args.name}.png"
        if target == "-" and croft.out.tty:
            raise UsageError("a picture would only disturb the terminal", "give a FILE")
        picture = croft.api.request("GET", f"/v1/vms/{quote(args.name)}/screenshot").read()
        if target == "-":
            sys.stdout.buffer.write(picture)
            return OK
        with open(target, "wb") as file:
            file.write(picture)
        width, height = (int.from_bytes(picture[i : i + 4], "big") for i in (16, 20))  # IHDR
        if croft.json:
            croft.print_json({"file": target, "width": width, "height": height})
        croft.say(f"{target}: {width}×{height}")
        return OK
