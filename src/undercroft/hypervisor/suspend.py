"""A guest's state in a file: written when it is suspended, read when it is resumed.

The file is QEMU's migration stream. Beside it, under the name + ``.plan``, is the plan of the
machine that it came from: only the same machine can take it up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from undercroft.hypervisor.plan import MachinePlan, decode_plan, encode_plan
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import DataCorruptError, NoSpaceError, QmpError

__all__ = [
    "discard_state",
    "full_message",
    "is_full",
    "link_state",
    "load_state",
    "save_devices",
    "save_state",
    "stop_saving",
    "suspended_plan",
]

_POLL = 0.02
_STREAM = "state"
_SET = "file:/dev/fdset/"
_FILE_URI = (8, 2, 0)  # QEMU that knows ``file:``; for newer ones ``fd:`` to a file is deprecated
_UNDER_WAY = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")
_NOTHING = 256 << 10  # bytes: with no more than that free, the disk is full
_UNLIMITED = 1 << 40  # bytes per second; QEMU's own default is 128 MiB


def _plan_path(path: Path) -> Path:
    return path.with_name(path.name + ".plan")


def _part_path(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def suspended_plan(path: Path) -> MachinePlan:
    """The plan with which the state in ``path`` must be resumed (same hardware, same board
    version). Its files and ports may be set anew; its devices may not.

    Raises:
        DataCorruptError: there is none, or it is damaged.
    """
    try:
        path.stat()
        return decode_plan(_plan_path(path).read_bytes())
    except (OSError, msgspec.MsgspecError) as error:
        raise DataCorruptError(
            f"the suspended state in {path} cannot be resumed: {error}",
            action="start the VM afresh; what was in its memory is lost",
        ) from error


def discard_state(path: Path) -> None:
    """Removes a suspended state, durably, and whatever an interrupted suspend left."""
    there = path.exists()
    for name in (path, _plan_path(path), _part_path(path)):
        name.unlink(missing_ok=True)
    if there:
        _sync(path.parent)


def link_state(path: Path, other: Path) -> None:
    """Keeps a saved state under another name as well. Neither file is ever written to again, so
    they may share their content."""
    for old, new in ((_plan_path(path), _plan_path(other)), (path, other)):
        new.unlink(missing_ok=True)
        os.link(old, new)
    _sync(other.parent)


async def save_state(
    monitor: Monitor,
    plan: MachinePlan,
    path: Path,
    progress: Callable[[float], None] | None,
) -> None:
    """Writes the state of a stopped guest; the file is complete and on disk when it is there.

    Raises:
        NoSpaceError, QmpError, TimeLimitError: it did not work; there is no file.
    """
    part = _part_path(path)
    try:
        if not await _written_already(monitor, part, progress):
            if (await monitor.execute("query-status"))["status"] == "postmigrate":
                # QEMU does not migrate twice in a row; there is no file, so the guest may go on
                # for a moment.
                await monitor.execute("cont")
                await monitor.execute("stop")
            await _migrate_to(monitor, part, progress)
        # The state has all of the memory: who reads it needs no file that others share.
        alone = msgspec.structs.replace(plan, incoming=None, memory_file=None, memory_shared=False)
        await asyncio.to_thread(_publish, part, path, encode_plan(alone))
    except OSError as error:
        raise NoSpaceError(f"the state of vm {plan.name} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


async def save_devices(monitor: Monitor, plan: MachinePlan, path: Path) -> None:
    """Writes the state of a guest that has not run since it was loaded, all but its memory, which
    is a file that QEMU shares (``plan.memory_shared``).

    Raises:
        QmpError, TimeLimitError, OSError: it did not work; there is no file.
    """
    part = _part_path(path)
    try:
        await _forget_networks(monitor, plan)
        await _migrate_to(monitor, part, None, apart=True)
        await asyncio.to_thread(_publish, part, path, encode_plan(plan))
    finally:
        part.unlink(missing_ok=True)


async def _forget_networks(monitor: Monitor, plan: MachinePlan) -> None:
    """Takes away the networks beside the adapters, so that libslirp's memory of who had which
    address is not saved. A clone that asks with its new MAC would get the next one, to which no
    forwarded port leads."""
    for index, port in enumerate(plan.ports):
        if port.apart:
            await monitor.execute("netdev_del", {"id": f"net{index}"})


async def _written_already(
    monitor: Monitor, part: Path, progress: Callable[[float], None] | None
) -> bool:
    """Whether QEMU has written the state for a daemon that died over that, or is just doing so:
    then it is waited for."""
    if (await monitor.execute("query-migrate")).get("status") in _UNDER_WAY:
        with contextlib.suppress(QmpError):
            await _follow(monitor, "written", progress)
    status = (await monitor.execute("query-status"))["status"]
    migration = (await monitor.execute("query-migrate")).get("status")
    return status == "postmigrate" and migration == "completed" and part.exists()


def _publish(part: Path, path: Path, plan: bytes) -> None:
    """Makes the file durable, and only then visible under its name."""
    plan_path = _plan_path(path)
    temporary = _part_path(plan_path)
    with temporary.open("wb") as file:
        file.write(plan)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, plan_path)
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def _memory_apart(monitor: Monitor, apart: bool) -> None:
    """Says whether memory that is a file goes into the stream, or stays in its file."""
    capability = {"capability": "x-ignore-shared", "state": apart}
    await monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})


async def _migrate_to(
    monitor: Monitor,
    part: Path,
    progress: Callable[[float], None] | None,
    *,
    apart: bool = False,
) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(part, flags, 0o600)
    try:
        await monitor.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})
        uri = await _hand_over(monitor, descriptor)
    finally:
        os.close(descriptor)
    await _memory_apart(monitor, apart)
    await monitor.execute("migrate", {"uri": uri})
    await _let_go(monitor, uri)
    try:
        await _follow(monitor, "written", progress)
    except BaseException as error:
        # Also when we are cancelled: nobody must find QEMU still writing.
        with contextlib.suppress(Exception):
            await asyncio.shield(_cancel(monitor))
        if isinstance(error, QmpError) and await asyncio.to_thread(is_full, part.parent):
            # QEMU calls a short write anything.
            raise NoSpaceError(full_message(monitor.name, part.parent)) from error
        raise


def full_message(name: str, directory: Path) -> str:
    """That the state of a VM finds no room."""
    return f"the state of {name} cannot be written: the disk that holds {directory} is full"


def is_full(directory: Path) -> bool:
    """Whether nothing can be written on the disk that a directory is on. Blocks."""
    usage = os.statvfs(directory)
    return usage.f_bavail * usage.f_frsize < _NOTHING


async def _hand_over(monitor: Monitor, descriptor: int) -> str:
    """Gives QEMU the file; under which address it migrates to or from there."""
    if monitor.version >= _FILE_URI:
        return f"{_SET}{await monitor.add_to_set(descriptor)}"
    await monitor.give(descriptor, _STREAM)
    return f"fd:{_STREAM}"


async def _let_go(monitor: Monitor, uri: str) -> None:
    """Has QEMU, which has opened the file by now, keep nothing of it beyond the migration: removed,
    it would take its room on the disk as long as that QEMU lives."""
    if uri.startswith(_SET):
        await monitor.remove_set(int(uri.removeprefix(_SET)))


async def _cancel(monitor: Monitor) -> None:
    await monitor.execute("migrate_cancel")
    while True:
        status = (await monitor.execute("query-migrate")).get("status")
        if status not in _UNDER_WAY:
            return
        await asyncio.sleep(_POLL)


async def stop_saving(monitor: Monitor) -> None:
    """Has QEMU give up writing a state that a daemon that died had asked it for.

    Raises:
        QmpError, TimeLimitError: it does not.
    """
    if (await monitor.execute("query-migrate")).get("status") in _UNDER_WAY:
        await _cancel(monitor)


async def _follow(monitor: Monitor, verb: str, progress: Callable[[float], None] | None) -> None:
    """Waits for the end of a migration.

    Raises:
        NoSpaceError, QmpError: it failed.
    """
    while True:
        answer = await monitor.execute("query-migrate")
        status = answer.get("status", "none")
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            reason = answer.get("error-desc", status)
            message = f"the state of {monitor.name} cannot be {verb}: {reason}"
            if "No space left" in reason or "quota" in reason.lower():
                raise NoSpaceError(message)
            raise QmpError(message)
        if progress is not None and (ram := answer.get("ram")) and ram["total"]:
            progress(1.0 - min(ram["remaining"] / ram["total"], 1.0))
        await asyncio.sleep(_POLL)


async def load_state(monitor: Monitor, path: Path, *, apart: bool = False) -> None:
    """Reads a state into a QEMU that was started to receive one; the guest stays paused.
    ``apart``: memory is not in it (`save_devices`).

    Raises:
        QmpError: it does not fit or is damaged (QEMU may have ended over it).
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        uri = await _hand_over(monitor, descriptor)
    finally:
        os.close(descriptor)
    await _memory_apart(monitor, apart)
    await monitor.execute("migrate-incoming", {"uri": uri})
    await _let_go(monitor, uri)
    await _follow(monitor, "read", None)
