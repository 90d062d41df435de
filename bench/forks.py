"""What an instant clone costs at least, by parts: QEMU by hand goes on from the same frozen moment,
and nobody makes it another one."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from socket import socket
from typing import Any

from bench.byhand import ByHand, Running
from bench.console import LIMIT
from bench.figures import Series, Unit
from bench.processes import faults, used_seconds

_EARLY = ("serial", "qmp", "agent", "helper")
_LOOK = 0.001  # seconds
AT_ONCE = 4 * (os.cpu_count() or 1)
PARTS = {
    "start": "QEMU executed, until its monitor answers",
    "load": "state loaded",
    "answer": "the guest goes on, until its agent has told its name",
}


class Channel:
    """One end of a conversation in JSON, line by line: QEMU's monitor, or the guest's agent."""

    def __init__(self, connection: socket) -> None:
        connection.settimeout(LIMIT)
        self._file = connection.makefile("rwb")
        self._events: list[dict[str, Any]] = []

    def receive(self) -> dict[str, Any]:
        """The next line.

        Raises:
            EOFError: there is none any more.
        """
        line = self._file.readline()
        if not line:
            raise EOFError("QEMU has ended")
        return dict(json.loads(line))

    def execute(self, command: str, **arguments: Any) -> Any:
        """What a command returns.

        Raises:
            RuntimeError: it failed.
        """
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while "event" in (answer := self.receive()):
            self._events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{command} failed: {answer['error']}")
        return answer["return"]

    def stood(self) -> float:
        """Seconds for which the guest was stopped last, by the events that came until now."""
        moments = {"STOP": 0.0, "RESUME": 0.0}
        for event in self._events:
            if event["event"] in moments:
                stamp = event["timestamp"]
                moments[event["event"]] = stamp["seconds"] + stamp["microseconds"] / 1e6
        return moments["RESUME"] - moments["STOP"]

    def event(self, name: str) -> dict[str, Any]:
        """The data of the next event of this name, those included that came while something else
        was waited for; others are forgotten."""
        while True:
            event = self._events.pop(0) if self._events else self.receive()
            if event.get("event") == name:
                return dict(event.get("data", {}))


@dataclass(frozen=True)
class Part:
    """What a part took, in seconds of time and of QEMU's processor time, and its page faults."""

    took: float
    cpu: float
    faults: int


def go_on(by_hand: ByHand, running: Running, name: str) -> dict[str, Part]:
    """Has a QEMU that was just executed load what it is to go on from, until the guest's agent
    answers that it is called ``name``; by parts."""
    pid = running.process.pid
    parts: dict[str, Part] = {}
    last = (running.began, 0.0, 0)

    def done(part: str) -> None:
        nonlocal last
        now = (time.perf_counter(), used_seconds(pid), faults(pid))
        parts[part] = Part(now[0] - last[0], now[1] - last[1], now[2] - last[2])
        last = now

    monitor = Channel(running.sockets["qmp"].connection)
    monitor.receive()
    monitor.execute("qmp_capabilities")
    done("start")
    capability = {"capability": "x-ignore-shared", "state": True}
    monitor.execute("migrate-set-capabilities", capabilities=[capability])
    monitor.execute("migrate-incoming", uri=f"file:{by_hand.plan.incoming}")
    while (status := monitor.execute("query-migrate").get("status")) != "completed":
        if status == "failed":
            raise RuntimeError("QEMU cannot load the state")
        time.sleep(_LOOK)
    done("load")
    agent = Channel(running.sockets["agent"].connection)
    monitor.execute("cont")
    told = agent.execute("guest-get-host-name")["host-name"]
    done("answer")
    if told != name:
        raise RuntimeError(f"the guest is called {told}, not {name}")
    return parts


@contextlib.contextmanager
def forks(by_hand: ByHand, directory: Path, name: str, count: int) -> Iterator[Forks]:
    """This many at once, several under way together; the context begins when all
    have answered."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(AT_ONCE) as pool:
        places = [directory / f"fork-{number}" for number in range(count)]
        for place in places:
            place.mkdir(exist_ok=True)

        def one(place: Path) -> tuple[int, dict[str, Part]]:
            running = stack.enter_context(by_hand.running(*_EARLY, directory=place))
            return running.process.pid, go_on(by_hand, running, name)

        began = time.perf_counter()
        found = list(pool.map(one, places))
        took = time.perf_counter() - began
        yield Forks(took, [pid for pid, _ in found], [parts for _, parts in found])


@dataclass(frozen=True)
class Forks:
    """How long they took altogether, their pids, and the parts of each."""

    took: float
    pids: list[int]
    parts: list[dict[str, Part]]

    @property
    def cpu(self) -> float:
        """Processor seconds of a QEMU, on average."""
        return sum(part.cpu for parts in self.parts for part in parts.values()) / len(self.parts)


def table(found: list[dict[str, Part]]) -> str:
    """The parts of all, as Markdown."""

    def cell(name: str, value: Callable[[Part], float], unit: Unit) -> str:
        return unit.text(Series(tuple(value(parts[name]) for parts in found)).median)

    rows = ["| part, by hand | processor time | time | page faults |", "| --- | --- | --- | --- |"]
    for name, text in PARTS.items():
        cpu = cell(name, lambda part: part.cpu, Unit.SECONDS)
        took = cell(name, lambda part: part.took, Unit.SECONDS)
        count = Series(tuple(float(parts[name].faults) for parts in found)).median
        rows.append(f"| {text} | {cpu} | {took} | {count:,.0f} |")
    return "\n".join(rows)
