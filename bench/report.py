"""The report: docs/benchmarks.md."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path

from bench import libvirt
from bench.figures import Figure, Section
from bench.installation import described

QUIET = 0.10  # share of the processors that other work may use when we begin
_INTRODUCTION = """\
# Benchmarks

Written by `script/bench`, which measures every figure that Undercroft must reach beside its peer,
in one run and in turn (ours, peer, ours, peer, …). Values are medians, with the range and the
number of runs in brackets. `script/bench NAME` repeats one benchmark and prints its part."""


def render(sections: Sequence[Section], conditions: Sequence[str]) -> str:
    """The whole report as Markdown."""
    parts = [_INTRODUCTION, "\n".join(f"- {line}" for line in conditions)]
    parts.append(_summary(sections))
    parts += [text(section) for section in sections]
    return "\n\n".join(parts) + "\n"


def text(section: Section) -> str:
    """One section as Markdown."""
    peer = section.peer or "peer"
    rows = [
        f"| what | must reach | Undercroft | {peer} | ratio | reached |",
        "| --- | --- | --- | --- | --- | --- |",
        *(_row(figure) for figure in section.figures),
    ]
    parts = [f"## {section.title}", section.method, "\n".join(rows), *section.notes]
    return "\n\n".join([*parts, f"Repeat: `script/bench {section.name}`"])


def _row(figure: Figure) -> str:
    cells = [
        figure.what,
        figure.must or "–",
        figure.ours.text(figure.unit),
        "–" if figure.peer is None else figure.peer.text(figure.unit),
        "–" if figure.ratio is None else f"{figure.ratio:.2f}",
        {True: "yes", False: "**no**", None: "–"}[figure.reached],
    ]
    return f"| {' | '.join(cells)} |"


def _summary(sections: Sequence[Section]) -> str:
    judged = [f for section in sections for f in section.figures if f.reached is not None]
    missed = [f.what for f in judged if not f.reached]
    words = f"{len(judged) - len(missed)} of {len(judged)} figures reached."
    return f"{words} Missed: {'; '.join(missed)}." if missed else words


def conditions(busy: float) -> list[str]:
    """On what and when it was measured. ``busy``: the share of the processors that others took
    just before."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    cores = len(os.sched_getaffinity(0))
    versions = [
        described(["qemu-system-x86_64", "--version"]),
        f"Python {platform.python_version()}",
        f"SQLite {sqlite3.sqlite_version}",
    ]
    try:
        versions.append(f"libvirt {libvirt.version()}")
    except (OSError, RuntimeError):
        versions.append("no libvirt")
    return [
        f"Machine: {cores} cores ({found[1] if found else platform.machine()}), "
        f"{memory / (1 << 30):.0f} GiB, Linux {platform.release().split('-')[0]}",
        f"Date: {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC",
        f"Versions: {', '.join(versions)}",
        f"Other work kept {busy * 100:.0f} % of the processors busy just before"
        + (
            ": the machine was not quiet, every time is too long, and only ratios, memory and "
            "processor times mean something"
            if busy > QUIET
            else ""
        ),
    ]


def busy_share(seconds: float = 2.0) -> float:
    """The share of the processors' time that is used while we sleep (proc(5), /proc/stat)."""

    def now() -> tuple[int, int]:
        fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    total, idle = now()
    time.sleep(seconds)
    total_after, idle_after = now()
    return 1.0 - (idle_after - idle) / max(total_after - total, 1)
