"""QEMU processes that a crash of the daemon left without an owner.

Every emulator works in its VM's directory; one that belongs to this data directory and that no
VM's record accounts for is ended.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
from pathlib import Path

import msgspec
import structlog

from undercroft.host.environment import Environment
from undercroft.model.vm import Instance

log = structlog.get_logger(__name__)

PROGRAMS = ("qemu-system-", "swtpm")
INSTANCE_FILE = "instance.json"
PATIENCE = 5.0  # seconds to wait for a killed process to be gone


def recorded_instance(environment: Environment, vm: str) -> Instance | None:
    """What was written down beside the sockets when QEMU was started, in case the daemon died
    before it could tell the store."""
    try:
        data = (environment.run_directory(vm) / INSTANCE_FILE).read_bytes()
        return msgspec.json.decode(data, type=Instance)
    except (OSError, msgspec.MsgspecError):
        return None


def marked_processes(data: Path) -> dict[int, str]:
    """Living emulators that belong to this data directory, by pid, with the id of their VM.

    They are known by their working directory, DATA/vms/ID, which they cannot lose by accident.
    """
    home = str(data.resolve() / "vms")
    found: dict[int, str] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            where = os.readlink(f"/proc/{entry}/cwd").removesuffix(" (deleted)")
            if os.path.dirname(where) != home:
                continue
            program = os.path.basename(os.readlink(f"/proc/{entry}/exe"))
            if program.startswith(PROGRAMS) and _lives(entry):
                found[int(entry)] = os.path.basename(where)
        except OSError:
            continue
    return found


def _lives(pid: str) -> bool:
    state = Path("/proc", pid, "stat").read_text().rpartition(")")[2].split()[0]
    return state not in "ZX"


async def end_orphans(environment: Environment, owned: set[int]) -> list[int]:
    """Kills the emulators of this data directory that nobody owns; returns their pids."""

    def end() -> list[int]:
        return end_processes(environment.data, set(marked_processes(environment.data)) - owned)

    return await asyncio.to_thread(end)


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
