"""The parts measured by themselves, by programs of their own: the API on one core, the store."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.figures import Figure, Section, Series, Unit
from bench.processes import run

_GETS = 2000.0  # per second
_LIST = 0.040  # seconds


def api(directory: Path, runs: int) -> list[Section]:
    """`bench.api`, which pins the server to one core and asks from another."""
    found = [_program("bench.api") for _ in range(runs)]

    def series(name: str, scale: float = 1.0) -> Series:
        return Series(tuple(one[name] * scale for one in found))

    one, lists = series("get_per_second"), series("list_ms", 1e-3)
    figures = [
        Figure(
            "GET of one VM",
            f"≥ {_GETS:,.0f}/s",
            one,
            Unit.RATE,
            one.median >= _GETS,
            series("hello_per_second"),
        ),
        Figure(
            "GET of one VM, by the server's processor time (what a core gives that has "
            "nothing else to do)",
            "",
            series("get_per_cpu_second"),
            Unit.RATE,
            None,
            series("hello_per_cpu_second"),
        ),
        Figure(
            "list of 1,000 VMs, complete",
            f"≤ {_LIST * 1000:.0f} ms",
            lists,
            Unit.SECONDS,
            lists.median <= _LIST,
        ),
        _told("list of 1,000 VMs, five fields of each", series("list_fields_ms", 1e-3)),
        _told("list filtered and sorted (111 VMs)", series("list_filter_sort_ms", 1e-3)),
    ]
    return [
        Section(
            "api",
            "API on one core, 1,000 VMs",
            "The API over a store with 1,000 VMs, in a process pinned to one core, asked over "
            "keep-alive connections of its unix socket from another core; the peer answers 1,500 "
            "fixed bytes to the same requests.",
            figures,
            "bare uvicorn",
        )
    ]


def store(directory: Path, runs: int) -> list[Section]:
    """`bench.store`, against Python's sqlite3 module and the same SQL."""
    found = [_program("bench.store") for _ in range(runs)]
    figures = []
    for index, row in enumerate(found[0]):

        def series(name: str, index: int = index) -> Series:
            return Series(tuple(one[index][name] for one in found))

        peer = series("by_hand") if "by_hand" in row else None
        figures.append(_told(row["what"], series("undercroft"), peer))
    return [
        Section(
            "store",
            "Store",
            "Time per call with 1,000 VMs in the store; the peer is Python's sqlite3 module on the "
            "same file format with the same statements and a commit for each transaction.",
            figures,
            "sqlite3 by hand",
        )
    ]


def _told(what: str, ours: Series, peer: Series | None = None) -> Figure:
    return Figure(what, "", ours, Unit.SECONDS, None, peer)


def _program(module: str) -> Any:
    return json.loads(run([sys.executable, "-m", module, "--json"], timeout=300.0))
