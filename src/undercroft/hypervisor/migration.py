"""QEMU's migration, to and from a file."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.state_file import full_message, is_full
from undercroft.model.errors import NoSpaceError, QmpError

__all__ = [
    "begin_writing",
    "cancel",
    "failure",
    "follow",
    "raise_if_full",
    "read_from",
    "report",
    "stop_saving",
    "under_way",
    "write_to",
]

_POLL = 0.02
_STREAM = "state"
_SET = "file:/dev/fdset/"
_FILE_URI = (8, 2, 0)  # QEMU that knows ``file:``; for newer ones ``fd:`` to a file is deprecated
_UNDER_WAY = ("setup", "active", "pre-switchover", "device", "cancelling", "wait-unplug")
_UNLIMITED = 1 << 40  # bytes per second; QEMU's own default is 128 MiB


async def _set_capabilities(monitor: Monitor, *, apart: bool, live: bool = False) -> None:
    """``apart``: memory that is a file stays in that, and out of the stream."""
    wanted = {"x-ignore-shared": apart, "pause-before-switchover": live, "events": live}
    capabilities = [{"capability": name, "state": state} for name, state in wanted.items()]
    await monitor.execute("migrate-set-capabilities", {"capabilities": capabilities})


async def write_to(
    monitor: Monitor,
    part: Path,
    progress: Callable[[float], None] | None,
    *,
    apart: bool = False,
) -> None:
    """Has QEMU write the state of a guest that stands still into the file ``part``.

    Raises:
        NoSpaceError, QmpError, OSError: it did not work.
    """
    await begin_writing(monitor, part, apart=apart)
    try:
        await follow(monitor, "written", progress)
    except BaseException as error:
        # Also when we are cancelled: nobody must find QEMU still writing.
        with contextlib.suppress(Exception):
            await asyncio.shield(cancel(monitor))
        if isinstance(error, QmpError):
            await raise_if_full(monitor, part, error)
        raise


async def raise_if_full(monitor: Monitor, part: Path, error: QmpError) -> None:
    """Of a state that could not be written into ``part``: QEMU calls a short write anything.

    Raises:
        NoSpaceError: the disk is full.
    """
    if await asyncio.to_thread(is_full, part.parent):
        raise NoSpaceError(full_message(monitor.name, part.parent)) from error


async def begin_writing(
    monitor: Monitor, part: Path, *, apart: bool = False, live: bool = False
) -> None:
    """Has QEMU begin to write the state into the file ``part``. ``live``: before it stops the guest
    for the last of it QEMU says ``pre-switchover`` (MIGRATION), and waits for
    ``migrate-continue``."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    descriptor = os.open(part, flags, 0o600)
    try:
        await monitor.execute("migrate-set-parameters", {"max-bandwidth": _UNLIMITED})
        uri = await _hand_over(monitor, descriptor)
    finally:
        os.close(descriptor)
    await _set_capabilities(monitor, apart=apart, live=live)
    await monitor.execute("migrate", {"uri": uri})
    await _let_go(monitor, uri)


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


async def cancel(monitor: Monitor) -> None:
    """Has QEMU give up a migration, and waits until it has."""
    await monitor.execute("migrate_cancel")
    while await under_way(monitor):  # noqa: ASYNC110 (it is QEMU that is asked)
        await asyncio.sleep(_POLL)


async def under_way(monitor: Monitor) -> bool:
    """Whether a migration is going on."""
    return (await monitor.execute("query-migrate")).get("status") in _UNDER_WAY


async def stop_saving(monitor: Monitor) -> None:
    """Has QEMU give up writing a state that a daemon that died had asked it for. A guest that went
    on meanwhile goes on; what is as good as written is waited for.

    Raises:
        QmpError, TimeLimitError: it does not.
    """
    if await under_way(monitor):
        await cancel(monitor)


async def follow(monitor: Monitor, verb: str, progress: Callable[[float], None] | None) -> None:
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
            raise failure(monitor, verb, answer)
        report(answer, progress)
        await asyncio.sleep(_POLL)


def failure(monitor: Monitor, verb: str, answer: Mapping[str, Any]) -> QmpError | NoSpaceError:
    """What to raise over a migration that ``answer`` (of ``query-migrate``) says has failed."""
    reason = str(answer.get("error-desc", answer.get("status", "unknown")))
    message = f"the state of {monitor.name} cannot be {verb}: {reason}"
    if "No space left" in reason or "quota" in reason.lower():
        return NoSpaceError(message)
    return QmpError(message)


def report(answer: Mapping[str, Any], progress: Callable[[float], None] | None) -> None:
    """Tells how much of the memory is written, by ``query-migrate``."""
    if progress is not None and (ram := answer.get("ram")) and ram["total"]:
        progress(1.0 - min(ram["remaining"] / ram["total"], 1.0))


async def read_from(monitor: Monitor, path: Path, *, apart: bool = False) -> None:
    """Has QEMU, started to receive a state, read that in ``path``.

    Raises:
        QmpError: it does not fit or is damaged (QEMU may have ended over it).
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        uri = await _hand_over(monitor, descriptor)
    finally:
        os.close(descriptor)
    await _set_capabilities(monitor, apart=apart)
    await monitor.execute("migrate-incoming", {"uri": uri})
    await _let_go(monitor, uri)
    await follow(monitor, "read", None)
