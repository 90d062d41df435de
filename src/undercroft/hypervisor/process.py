"""Processes that outlive us, told apart from any other that ever had their pid.

A process is its pid, its start time in clock ticks since boot, and the boot. We hold a pidfd from
the moment that these were compared, so that nothing can slip in between.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import resource
import signal
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["MARK", "ExitStatus", "Process", "boot_id", "spawn"]

MARK = "UNDERCROFT_VM"
"""Environment variable that tells, of every process started here, the directory of its VM; so that
one whose starter died before writing anything down can still be found (``/proc/PID/environ``)."""


_UNPRIVILEGED_UMASK = 0o077
_PR_SET_THP_DISABLE = 41
_FRUGAL = {"MALLOC_ARENA_MAX": "1"}  # mallopt(3)
_SPAWNING = threading.Lock()  # whether there are huge pages is a property of the whole process
_libc = ctypes.CDLL(None)

# linux/pidfd.h (6.13, exit information since 6.15): struct pidfd_info is 64 bytes.
_PIDFD_GET_INFO = (3 << 30) | (64 << 16) | (0xFF << 8) | 11
_PIDFD_INFO_EXIT = 1 << 3
_EXIT_WAIT = 1.0  # seconds that a parent gets to reap, after which the status counts as unknown


@dataclass(frozen=True)
class ExitStatus:
    """How a process ended; both None if nobody can tell."""

    code: int | None = None
    signal: int | None = None

    @classmethod
    def from_wait(cls, status: int) -> ExitStatus:
        """From the status word of wait(2)."""
        if os.WIFSIGNALED(status):
            return cls(signal=os.WTERMSIG(status))
        return cls(code=os.WEXITSTATUS(status))


def boot_id() -> str:
    """Identifies this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _stat(pid: int) -> list[str] | None:
    """The fields of ``/proc/PID/stat`` from the third on (proc(5)); None without the process.
    The second, the name, may contain anything, so the last parenthesis is what counts."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()


class Process:
    """A process and the pidfd that stands for it."""

    def __init__(self, pid: int, start_ticks: int, pidfd: int, *, child: bool) -> None:
        self.pid = pid
        self.start_ticks = start_ticks
        self._pidfd = pidfd
        self._child = child
        self._ended: asyncio.Future[ExitStatus] | None = None
        self._status: ExitStatus | None = None

    @classmethod
    def open(cls, pid: int, start_ticks: int | None = None) -> Process | None:
        """The process ``pid``, if it lives and started at ``start_ticks`` (None: whenever)."""
        if pid <= 0:
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        # The descriptor is held now: if the start time read from /proc afterwards is the right
        # one, then the descriptor means that process. A successor would have started later.
        fields = _stat(pid)
        if fields is None or fields[0] in "ZX" or start_ticks not in (None, int(fields[19])):
            os.close(pidfd)
            return None
        return cls(pid, int(fields[19]), pidfd, child=int(fields[1]) == os.getpid())

    @property
    def alive(self) -> bool:
        """Whether it runs. A zombie does not."""
        if self._pidfd < 0:
            return False
        fields = _stat(self.pid)
        return fields is not None and fields[0] not in "ZX" and int(fields[19]) == self.start_ticks

    def signal(self, number: int) -> None:
        """Sends a signal; to nobody if the process has ended."""
        if self._pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> ExitStatus:
        """Waits for its end. Any number of tasks may wait; each can be cancelled alone."""
        if self._status is not None:
            return self._status
        if self._ended is None:
            loop = asyncio.get_running_loop()
            self._ended = loop.create_future()
            loop.add_reader(self._pidfd, self._on_end, loop)
        return await asyncio.shield(self._ended)

    def _on_end(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.remove_reader(self._pidfd)
        self._collect(loop, loop.time() + _EXIT_WAIT)

    def _collect(self, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        status = self._exit_status()
        if status is None and loop.time() < deadline:
            loop.call_later(0.01, self._collect, loop, deadline)
            return
        self._status = status or ExitStatus()
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(self._status)
        self.close()

    def _exit_status(self) -> ExitStatus | None:
        """What is known of its end, by whichever way there is."""
        if self._pidfd < 0:
            return None
        if self._child:
            with contextlib.suppress(ChildProcessError):
                result = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
                if result is None:
                    return None
                if result.si_code == os.CLD_EXITED:
                    return ExitStatus(code=result.si_status)
                return ExitStatus(signal=result.si_status)
        # Not our child: its zombie tells (field 52), as long as nobody has reaped it …
        fields = _stat(self.pid)
        if fields is not None and fields[0] == "Z" and int(fields[19]) == self.start_ticks:
            return ExitStatus.from_wait(int(fields[49]))
        # … and once somebody has, new kernels do.
        request = bytearray(struct.pack("QQ11Ii", _PIDFD_INFO_EXIT, *[0] * 13))
        try:
            fcntl.ioctl(self._pidfd, _PIDFD_GET_INFO, request)
        except OSError:
            return None
        answer = struct.unpack("QQ11Ii", request)
        return ExitStatus.from_wait(answer[13]) if answer[0] & _PIDFD_INFO_EXIT else None

    def detach(self) -> None:
        """Lets go of it, running or not."""
        if self._ended is not None and not self._ended.done():
            asyncio.get_running_loop().remove_reader(self._pidfd)
            self._ended.cancel()
        self.close()

    def close(self) -> None:
        """Closes the descriptor."""
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def cpu_seconds(self) -> float:
        """Processor time used so far, by user and kernel; 0.0 once it has ended."""
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.start_ticks:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> int:
        """Bytes that it holds in the host's memory: its proportional share (PSS), or what is
        resident (RSS) where the former may not be read. Takes milliseconds for a large process:
        not for the event loop."""
        try:
            for text in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines():
                if text.startswith("Pss:"):
                    return int(text.split()[1]) * 1024
        except OSError:
            with contextlib.suppress(OSError):
                pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
                return int(pages) * os.sysconf("SC_PAGE_SIZE")
        return 0


def spawn(
    argv: Sequence[str],
    *,
    pass_fds: Sequence[int],
    output: int,
    directory: Path,
    mark: str,
    uid: int | None = None,
    gid: int | None = None,
    group: int | None = None,
    frugal: bool = False,
) -> Process:
    """Starts a program that goes on when we die: in a session of its own, with nothing of ours
    but ``mark`` (see `MARK`), ``pass_fds`` and ``output`` (its stdout and stderr), under a private
    file mode, without core dumps. ``uid`` and ``gid``: whom to run as, without any other
    group than ``group``. ``frugal``: it is to take no more memory than it
    uses, even if that makes it a little slower: no huge pages, one heap for all threads.

    Blocks until the program is running. Raises OSError if it cannot be executed.
    """
    identity: dict[str, Any] = {}
    if uid is not None:
        identity = {
            "user": uid,
            "group": gid if gid is not None else uid,
            "extra_groups": [] if group is None else [group],
        }
    environment = _environment() | (_FRUGAL if frugal else {})
    with _pages(small=frugal):
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=pass_fds,
            cwd=directory,
            env={**environment, MARK: mark},
            start_new_session=True,
            umask=_UNPRIVILEGED_UMASK,
            **identity,
        )
    pid = child.pid
    # From here on the pidfd alone waits for it: a Popen that believes its child to live would
    # try to reap it when it is collected, and take the status away.
    child.returncode = 0
    pidfd = os.pidfd_open(pid)
    with contextlib.suppress(OSError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
    fields = _stat(pid)
    if fields is None:  # it is our child: at worst a zombie, unless somebody reaps what is ours
        os.close(pidfd)
        raise ChildProcessError(f"process {pid} vanished")
    return Process(pid, int(fields[19]), pidfd, child=True)


@contextlib.contextmanager
def _pages(*, small: bool) -> Iterator[None]:
    """What is forked within this has no huge pages if it is to have only ``small`` ones: a process
    inherits that from ours (prctl(2), PR_SET_THP_DISABLE), and keeps it over its exec."""
    with _SPAWNING:
        if small:
            _libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
        try:
            yield
        finally:
            if small:
                _libc.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


def _environment() -> dict[str, str]:
    """Little: what is in ours may be secret, and a VM must not depend on who started it."""
    kept = {name: os.environ[name] for name in ("TZ", "LANG", "LC_ALL") if name in os.environ}
    return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **kept}
