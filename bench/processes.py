"""Processes of a benchmark: what they use, and that none is left behind (proc(5), prctl(2))."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TICK = os.sysconf("SC_CLK_TCK")
_libc = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """From now on what a descendant leaves behind becomes our child, and can be ended by us."""
    _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def die_with_parent() -> None:
    """For ``preexec_fn``: the process is killed when we end, however we end."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def children() -> list[int]:
    """The pids of our children, adopted ones included."""
    return [
        int(pid)
        for task in Path("/proc/self/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]


def end_children() -> int:
    """Kills and reaps whatever is still our child, and what that leaves behind; how many were."""
    ended = 0
    while found := children():
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
            ended += 1
    return ended


def end(process: subprocess.Popen[bytes], timeout: float = 20.0) -> None:
    """SIGTERM, and SIGKILL after ``timeout`` seconds; waits."""
    process.terminate()
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _stat(pid: int) -> list[str]:
    text = Path(f"/proc/{pid}/stat").read_text()
    return text[text.rindex(")") + 2 :].split()


def cpu_seconds(pid: int) -> tuple[float, float]:
    """Processor time, user and system, of a process itself, and of the children it waited for."""
    fields = _stat(pid)
    return (
        (int(fields[11]) + int(fields[12])) / _TICK,
        (int(fields[13]) + int(fields[14])) / _TICK,
    )


def used_seconds(pid: int) -> float:
    """Processor time of a process itself, all of its threads, those that have ended too, to the
    nanosecond (clock_getcpuclockid(3): the clock is the complement of the pid, and 2)."""
    return time.clock_gettime(~pid << 3 | 2)


def faults(pid: int) -> int:
    """How many page faults a process had that needed no disk."""
    return int(_stat(pid)[7])


def age(pid: int) -> float:
    """Seconds since a process began."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(_stat(pid)[19]) / _TICK


def memory(pid: int) -> tuple[int, int]:
    """Resident bytes of a process, and its proportional share (PSS; 0 where it may not be read)."""
    resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    share = 0
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                share = int(line.split()[1]) * 1024
    return resident * os.sysconf("SC_PAGE_SIZE"), share


def private_memory(pid: int) -> int:
    """Bytes that a process has for itself alone (USS)."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    private = ("Private_Clean:", "Private_Dirty:")
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(private))


def clean_environment() -> dict[str, str]:
    """Our environment without what changes how Python works or where croft looks."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "CROFT_", "LIBVIRT_"))
    }


def run(argv: Sequence[str], timeout: float = 120.0) -> bytes:
    """Runs a program and returns its output.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env=clean_environment(),
        timeout=timeout,
        check=False,
    )
    if done.returncode:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()
        raise RuntimeError(f"{' '.join(argv)} failed ({done.returncode}): {words}")
    return done.stdout


def timed(argv: Sequence[str], cpu: list[float] | None = None, timeout: float = 120.0) -> float:
    """Seconds from exec to exit of a program; its processor seconds are added to ``cpu``."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    run(argv, timeout)
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if cpu is not None:
        cpu.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return took


@contextlib.contextmanager
def terminate_is_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP unwind us as Ctrl-C does, so that everything is cleaned up."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
