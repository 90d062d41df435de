"""How long a guest stands still while something is done with it, seen from outside.

A program in it keeps its only processor busy. So the thread that is this processor runs, or waits
for a core of the host to run on, at all times but those in which QEMU does not let it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

BUSY = "while :; do :; done"
_READINGS, _BETWEEN = 100, 0.004  # how often, and seconds


def processor(pid: int) -> Path:
    """Where the kernel tells of the thread that is the first processor of a QEMU.

    Raises:
        RuntimeError: there is none.
    """
    for thread in Path(f"/proc/{pid}/task").iterdir():
        if (thread / "comm").read_text().startswith("CPU 0"):
            return thread
    raise RuntimeError(f"process {pid} has no processor")


def stopped(pid: int, action: Callable[[], object]) -> float:
    """Seconds in which the busy guest of a QEMU stood still while ``action`` was done."""
    thread = processor(pid)
    before = _still(thread)
    action()
    return max(_still(thread) - before, 0.0)


def _still(thread: Path) -> float:
    """What a clock shows that goes on only while the guest stands still. The kernel adds up late
    what a thread ran and waited (at its tick, and when it gets a core), never early: the least
    that is read while the guest goes on is right."""
    least = float("inf")
    for _ in range(_READINGS):
        time.sleep(_BETWEEN)
        # proc(5), schedstat: nanoseconds on a core, and waiting for one.
        ran, waited, _ = map(int, (thread / "schedstat").read_text().split())
        least = min(least, time.monotonic() - (ran + waited) / 1e9)
    return least


def numbered(prefix: str) -> Iterator[str]:
    """Names that were not used before."""
    number = 0
    while True:
        number += 1
        yield f"{prefix}{number}"
