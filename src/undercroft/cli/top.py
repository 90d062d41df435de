"""``croft top``: what VMs use, as it happens."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from contextlib import contextmanager

from undercroft.cli.command import Command, Namespace, Parser, duration
from undercroft.cli.errors import OK, UsageError
from undercroft.cli.output import Style, Table, dig, size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from undercroft.cli.context import Croft

# Per VM, from the daemon's metrics: name of the metric → our key.
_COUNTERS = {
    "cpu_seconds_total": "cpu",
    "disk_read_bytes_total": "read",
    "disk_written_bytes_total": "written",
    "network_receive_bytes_total": "received",
    "network_transmit_bytes_total": "sent",
}
_METRIC = re.compile(r'undercroft_vm_([a-z_]+)\{vm="([^"]*)",id="([^"]*)"\} (\S+)')
_SORT = ("cpu", "memory", "name")

Usage = dict[str, float | str]


class Top(Command):
    """``croft top``"""

    description = """
        Shows what each running VM uses of this host, again and again: CPU (100% is one core),
        memory that its QEMU really holds, disk and network. q or Ctrl-C leaves. Where there is no
        terminal it prints one table.
    """
    examples = (
        ("croft top", "all running VMs"),
        ("croft top --sort memory", "the largest first"),
        ("croft top --once --json", "for programs"),
    )

    def arguments(self, parser: Parser) -> None:
        parser.add_argument(
            "-i", "--interval", type=duration, default=2.0, metavar="TIME", help="(default: 2s)"
        )
        parser.add_argument("--sort", choices=_SORT, default="cpu", help="order (default: cpu)")
        parser.add_argument("-1", "--once", action="store_true", help="one table, then leave")

    def run(self, croft: Croft, args: Namespace) -> int:
        if not 0.1 <= args.interval <= 3600:
            raise UsageError("the interval must lie between 0.1 and 3600 seconds")
        host = croft.api.get("/v1/hosts/self")
        before = _measure(croft)
        if args.once or croft.json or not croft.out.tty:
            time.sleep(min(args.interval, 1.0))
            rows = usage(before, _measure(croft), args.sort)
            if croft.json:
                croft.print_json(rows)
            else:
                print(render(croft.out, rows), end="")
            return OK
        with _screen():
            while True:
                if _key(args.interval if before.previous else 0.5) in ("q", "Q", "\x03"):
                    return OK
                now = _measure(croft)
                now.previous = True
                _draw(croft, host, usage(before, now, args.sort))
                before = now


class Measurement:
    """All VMs' counters at one moment. ``previous``: whether there was one before."""

    def __init__(self, time: float, vms: dict[str, Usage]) -> None:
        self.time = time
        self.vms = vms
        self.previous = False


def _measure(croft: Croft) -> Measurement:
    text = croft.api.request("GET", "/metrics").read().decode()
    return Measurement(time.monotonic(), parse(text))


def parse(text: str) -> dict[str, Usage]:
    """Counters per VM (by id) out of the daemon's metrics."""
    vms: dict[str, Usage] = {}
    for line in text.splitlines():
        match = _METRIC.fullmatch(line)
        if match is None:
            continue
        metric, name, id, value = match.groups()
        key = _COUNTERS.get(metric) or ("memory" if metric == "memory_bytes" else None)
        if key is not None:
            vms.setdefault(id, {"name": name})[key] = float(value)
    return vms


def usage(before: Measurement, now: Measurement, sort: str) -> list[dict[str, Any]]:
    """What each VM used per second between two moments. ``cpu`` in cores, ``memory`` in bytes, the
    others in bytes per second; a counter that began anew counts from zero."""
    span = max(now.time - before.time, 0.001)
    rows = []
    for id, vm in now.vms.items():
        row: dict[str, Any] = {"vm": id, "name": vm["name"], "memory": int(vm.get("memory", 0))}
        old = before.vms.get(id, vm)
        for key in _COUNTERS.values():
            new, last = float(vm.get(key, 0)), float(old.get(key, 0))
            rate = (new - last if new >= last else new) / span
            row[key] = round(rate, 4) if key == "cpu" else int(rate)
        rows.append(row)
    if sort == "name":
        return sorted(rows, key=lambda row: str(row["name"]))
    return sorted(rows, key=lambda row: (-row[sort], row["name"]))


def render(style: Style, rows: list[dict[str, Any]]) -> str:
    """The table."""
    names = ("NAME", ">CPU", ">MEMORY", ">READ/S", ">WRITE/S", ">NET IN/S", ">NET OUT/S")
    table = Table(style, names, state="")
    for row in rows:
        rates = (size(row[key]) for key in ("read", "written", "received", "sent"))
        table.add(row["name"], f"{row['cpu']:.1%}", size(row["memory"]), *rates)
    return table.render()


def _draw(croft: Croft, host: Any, rows: list[dict[str, Any]]) -> None:
    cores = sum(row["cpu"] for row in rows)
    memory = sum(row["memory"] for row in rows)
    head = (
        f"{len(rows)} running on {dig(host, 'status.hostname', '')}: "
        f"{cores:.2f} of {dig(host, 'status.cpus')} cores, "
        f"{size(memory)} of {size(dig(host, 'status.memory'))}   "
        f"{croft.out.paint('q leaves', 'dim')}"
    )
    try:
        height = os.get_terminal_size(sys.stdout.fileno()).lines
    except OSError:
        height = 24
    lines = [head, "", *render(croft.out, rows).splitlines()][: height - 1]
    # Home, each line cleared to its end, then what is below: no flicker.
    sys.stdout.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines) + "\x1b[J")
    sys.stdout.flush()


@contextmanager
def _screen() -> Iterator[None]:
    """The alternate screen without cursor, and keys without Enter; put back at the end."""
    from contextlib import nullcontext

    from undercroft.cli.terminal import raw

    keys = raw(sys.stdin.fileno()) if sys.stdin.isatty() else nullcontext()
    with keys:
        sys.stdout.write("\x1b[?1049h\x1b[?25l\x1b[2J")
        sys.stdout.flush()
        try:
            yield
        finally:
            sys.stdout.write("\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()


def _key(wait: float) -> str:
    """A key that is pressed within the time, or nothing."""
    if not sys.stdin.isatty():
        time.sleep(wait)
        return ""
    ready, _, _ = select.select([sys.stdin], [], [], wait)
    return os.read(sys.stdin.fileno(), 16).decode("latin-1")[:1] if ready else ""
