"""How fast the host's time stamp counter runs.

Under TCG it is also the guest's. A microvm has no other clock to compare it with but the PIT,
and on a busy host a guest's comparison fails: the kernel then calls the counter unusable and
waits for ever for a tick. So it is told (``tsc_early_khz=``, kernel-parameters.txt).
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable

__all__ = ["measure_tsc_khz"]

# rdtsc; shl rdx, 32; or rax, rdx; ret
_READ_COUNTER = bytes.fromhex("0f31 48c1e220 4809d0 c3")
_INTERVAL = 0.005
_SAMPLES = 20


def measure_tsc_khz() -> int | None:
    """The frequency in kHz, to some 50 parts in a million; takes 5 ms. None where there is no
    such counter, or the host forbids making code."""
    if platform.machine() != "x86_64":
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:
        return None
    page.write(_READ_COUNTER)
    place = ctypes.c_char.from_buffer(page)
    read = ctypes.PYFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(place))
    clock, counter = _sample(read)
    time.sleep(_INTERVAL)
    later_clock, later_counter = _sample(read)
    del place, read
    page.close()
    return round((later_counter - counter) * 1e6 / (later_clock - clock))


def _sample(read: Callable[[], int]) -> tuple[int, int]:
    """Clock (nanoseconds) and counter at the same moment: of many pairs the one that was
    interrupted least."""
    pairs = []
    for _ in range(_SAMPLES):
        before = time.perf_counter_ns()
        counter = read()
        after = time.perf_counter_ns()
        pairs.append((after - before, (before + after) // 2, counter))
    _, clock, counter = min(pairs)
    return clock, counter
