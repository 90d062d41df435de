"""QEMU processes that a crash of the daemon left without an owner.

Every emulator is marked with its VM's directory, or one in that of the template whose memory it
makes; one that belongs to this data directory and that no record accounts for is ended.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path

import structlog

from undercroft.host.environment import Environment
from undercroft.hypervisor.process import MARK

log = structlog.get_logger(__name__)

PROGRAMS = ("qemu-system-", "swtpm")
PATIENCE = 5.0  # seconds to wait for a killed process to be gone


def marked_processes(data: Path) -> dict[int, str]:
    """Living emulators that belong to this data directory, by pid, with the id of their VM or
    template."""
    home = data.resolve()
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            program = os.path.basename(os.readlink(f"/proc/{entry}/exe"))
            if not program.startswith(PROGRAMS):
                continue
            directory = _marked(entry)
            owner = None if directory is None else _owner(directory, home)
            if owner is not None and _lives(entry):
                found[int(entry)] = owner
        except OSError:
            continue
    return found


def _marked(pid: str) -> Path | None:
    prefix = f"{MARK}=".encode()
    for variable in Path("/proc", pid, "environ").read_bytes().split(b"\0"):
        if variable.startswith(prefix):
            return Path(os.fsdecode(variable.removeprefix(prefix)))
    return None


def _owner(directory: Path, home: Path) -> str | None:
    try:
        parts = directory.resolve().relative_to(home).parts
    except ValueError:
        return None
    match parts:
        case ("vms", id) | ("templates", id, *_):
            return id
        case _:
            return None


def _lives(pid: str) -> bool:
    state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    return state not in "ZX"


def strays(data: Path, owned: set[str]) -> dict[int, str]:
    """The emulators of this data directory whose VMs (ids) nobody accounts for."""
    return {pid: vm for pid, vm in marked_processes(data).items() if vm not in owned}


async def end_orphans(environment: Environment, owned: set[str]) -> list[int]:
    """Kills the emulators of this data directory that nobody owns; returns their pids."""

    def end() -> list[int]:
        return end_processes(environment.data, set(strays(environment.data, owned)))

    return await asyncio.to_thread(end)


def end_machine(data: Path, vm: str) -> None:
    """Kills all processes of a VM."""
    end_processes(data, {pid for pid, owner in marked_processes(data).items() if owner == vm})


def end_processes(data: Path, pids: set[int]) -> list[int]:
    """Kills these processes if they are still emulators of the data directory, and waits for their
    end; returns the pids of those that are gone."""
    ended = []
    for pid in sorted(pids):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            ended.append(pid)
            continue
        try:
            if pid not in marked_processes(data):
                continue  # the pid went to another process before we held it
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            if select.select([handle], [], [], PATIENCE)[0]:
                log.warning("ended an orphan", pid=pid)
                ended.append(pid)
        except ProcessLookupError:
            ended.append(pid)
        finally:
            os.close(handle)
    return ended
