"""Helper programs (apt, mke2fs, qemu-img): run, bounded, and never left behind.

A child leads its own process group; whatever ends the wait early (cancellation, the time limit)
ends the whole group. Nothing here uses a shell.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from undercroft.model.errors import MissingToolError, ProgramError, TimeLimitError

__all__ = [
    "Identity",
    "Limits",
    "Progress",
    "no_progress",
    "run",
    "share_of",
    "tool",
]

Progress = Callable[[float, str], None]
"""Called with the fraction done (0 to 1) and what is being done; must not block."""

_KEEP = 64 * 1024  # of what a program says on stderr
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL
# Sysadmin programs (mke2fs, mkfs.vfat) live where an ordinary user's PATH does not look.
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def no_progress(fraction: float, phase: str) -> None:
    """A `Progress` that nobody watches."""


def share_of(progress: Progress, start: float, end: float) -> Progress:
    """A `Progress` for a part of the work: its 0 to 1 becomes ``start`` to ``end``."""

    def part(fraction: float, phase: str) -> None:
        progress(start + (end - start) * min(max(fraction, 0.0), 1.0), phase)

    return part


class Limits:
    """What a program that reads untrusted input may use: bytes of memory, seconds of CPU."""

    def __init__(self, *, memory: int, cpu: int, open_files: int = 64) -> None:
        self.memory = memory
        self.cpu = cpu
        self.open_files = open_files

    def prefix(self) -> list[str]:
        """The ``prlimit`` command that applies the limits before the program starts."""
        return [
            tool("prlimit", package="util-linux"),
            f"--as={self.memory}",
            f"--cpu={self.cpu}",
            f"--nofile={self.open_files}",
            "--core=0",
            "--",
        ]


class Identity:
    """The unprivileged uid and gid that a program runs as; only root can hand its own away."""

    def __init__(self, uid: int, gid: int) -> None:
        self.uid = uid
        self.gid = gid

    def prefix(self) -> list[str]:
        """The ``setpriv`` command that takes the identity on (uvloop's subprocesses cannot)."""
        return [
            tool("setpriv", package="util-linux"),
            f"--reuid={self.uid}",
            f"--regid={self.gid}",
            "--clear-groups",
            "--no-new-privs",
            "--",
        ]


def tool(name: str, *, package: str) -> str:
    """The path of a program.

    Raises:
        MissingToolError: not installed; the action names the package that has it.
    """
    found = shutil.which(name, path=os.environ.get("PATH", "") + os.pathsep + _PATH)
    if found is None:
        raise MissingToolError(
            f"the program {name} is not installed",
            object=name,
            action=f"install the package {package} (Debian: apt-get install {package})",
        )
    return found


async def run(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    timeout: float | None = None,
    limits: Limits | None = None,
    identity: Identity | None = None,
    on_line: Callable[[str], None] | None = None,
    on_output: Callable[[bytes], None] | None = None,
    output_limit: int = 16 << 20,
    success: Container[int] = (0,),
) -> bytes:
    """Runs a program to its end; returns what it wrote to stdout, at most ``output_limit`` bytes.

    ``env`` is added to a small fixed environment; ``timeout`` is in seconds; ``on_line`` gets each
    line of stderr as it comes, ``on_output`` what comes on stdout. With ``identity`` the program
    runs as that uid and gid. ``success`` has the exit codes that are no failure.

    Raises:
        ProgramError: it failed; ``data`` holds ``exit`` (negative: the signal that ended it).
        TimeLimitError: it took longer than ``timeout``.
        MissingToolError: no such program.
    """
    name = Path(argv[0]).name
    command = [
        *(identity.prefix() if identity else []),
        *(limits.prefix() if limits else []),
        *argv,
    ]
    # A fixed locale and time zone make builds repeatable and messages recognizable.
    environment = {
        "PATH": os.environ.get("PATH", "") + os.pathsep + _PATH,
        "LC_ALL": "C.UTF-8",
        "TZ": "UTC",
        "HOME": os.environ.get("HOME", "/"),
        **(env or {}),
    }
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=cwd,
            env=environment,
            start_new_session=True,
        )
    )
    try:
        child = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # asyncio would end only the leader of a child that is cancelled while it starts.
        with contextlib.suppress(OSError):
            await _end(await starting)
        raise
    except FileNotFoundError as error:
        raise MissingToolError(
            f"the program {name} is not installed", object=name, action=f"install {name}"
        ) from error
    said = bytearray()
    try:
        async with asyncio.timeout(timeout):
            async with asyncio.TaskGroup() as group:
                output = group.create_task(_read_all(child.stdout, output_limit, on_output))
                group.create_task(_read_lines(child.stderr, said, on_line))
                if stdin is not None:
                    group.create_task(_feed(child, stdin))
            await child.wait()
    except TimeoutError as error:
        raise TimeLimitError(
            f"{name} did not finish within {timeout:.0f} s", object=name
        ) from error
    finally:
        await asyncio.shield(_end(child))
    if child.returncode not in success:
        text = bytes(said).decode(errors="replace").strip()
        raise ProgramError(
            f"{name} failed with {_outcome(child.returncode)}: {text[-2000:] or 'no message'}",
            object=name,
            exit=child.returncode,
        )
    return output.result()


def _outcome(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


async def _read_all(
    stream: asyncio.StreamReader | None, limit: int, on_output: Callable[[bytes], None] | None
) -> bytes:
    data = bytearray()
    while stream is not None and (chunk := await stream.read(65536)):
        data += chunk[: max(0, limit - len(data))]
        if on_output is not None:
            on_output(chunk)
    return bytes(data)


async def _read_lines(
    stream: asyncio.StreamReader | None, said: bytearray, on_line: Callable[[str], None] | None
) -> None:
    partial = b""
    while stream is not None and (chunk := await stream.read(4096)):
        said += chunk
        del said[: max(0, len(said) - _KEEP)]
        if on_line is not None:
            *lines, partial = (partial + chunk).split(b"\n")
            partial = partial[-_KEEP:]
            for line in lines:
                on_line(line.decode(errors="replace"))


async def _feed(child: asyncio.subprocess.Process, data: bytes) -> None:
    if child.stdin is None:
        return
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        child.stdin.write(data)
        await child.stdin.drain()
    child.stdin.close()


async def _end(child: asyncio.subprocess.Process) -> None:
    """Ends the child's whole group, if the child has not ended by itself."""
    if child.returncode is not None:
        return
    # The leader has not been waited for, so the group's number cannot be another's.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        async with asyncio.timeout(_GRACE):
            await child.wait()
    except TimeoutError:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()
