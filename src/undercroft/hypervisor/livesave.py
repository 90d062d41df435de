"""Saving a guest's state while it goes on.

QEMU writes the memory, and what the guest changes meanwhile again, until so little is left that it
is a matter of milliseconds (as in a live migration). For these the guest stands still: its disks
branch off, the rest is written, and it goes on. State and disks are of the same moment.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from undercroft.hypervisor.branch import Branching
from undercroft.hypervisor.migration import (
    begin_writing,
    cancel,
    failure,
    raise_if_full,
    report,
    under_way,
)
from undercroft.hypervisor.plan import MachinePlan, PlanDisk
from undercroft.hypervisor.qmp import Monitor, MonitorEvent
from undercroft.hypervisor.state_file import part_path, publish_state
from undercroft.hypervisor.suspend import alone
from undercroft.model.errors import NoSpaceError, QmpError, TimeLimitError

__all__ = ["save_live"]

_EVENTS = ("MIGRATION", "MIGRATION_PASS", "STOP", "RESUME")
_LOOK_INTERVAL = 0.1  # seconds between two looks at how far it is
_STANDSTILL = 4  # milliseconds that the guest may stand still for the last of its memory ...
_PASSES = 3  # ... after so many passes over it twice as long with each, or it might never end
_FINISHING = 30.0  # seconds for QEMU to put away what it needed
_FINISHING_INTERVAL = 0.0005

_Events = asyncio.Queue[MonitorEvent]


async def save_live(
    monitor: Monitor,
    plan: MachinePlan,
    path: Path,
    disks: Sequence[PlanDisk],
    going: Callable[[], bool],
    progress: Callable[[float], None] | None,
) -> float:
    """Writes the state of a guest that goes on, and has its disks written to other files (as
    `branch` does) from the moment on that the state is of. For how many seconds the guest stood
    still. ``going``: whether it is to go on after that; not if it has stopped by itself.

    Raises:
        NoSpaceError, QmpError, TimeLimitError, OSError: it did not work; there is no file. The
            guest goes on; which files it writes to is to be asked for.
    """
    part = part_path(path)
    try:
        with monitor.watching(*_EVENTS) as events:
            branching = await _until_little_is_left(monitor, part, disks, events, progress)
            over = asyncio.ensure_future(_switch_over(monitor, branching, events, going))
            try:
                stood = await asyncio.shield(over)
            except asyncio.CancelledError:
                with contextlib.suppress(QmpError, TimeLimitError, NoSpaceError):
                    await over  # the guest must not be left standing
                raise
        try:
            await asyncio.to_thread(publish_state, part, path, alone(plan))
        except OSError as error:
            raise NoSpaceError(f"the state of {monitor.name} cannot be written: {error}") from error
        return stood
    except QmpError as error:
        await raise_if_full(monitor, part, error)
        raise
    finally:
        part.unlink(missing_ok=True)


async def _until_little_is_left(
    monitor: Monitor,
    part: Path,
    disks: Sequence[PlanDisk],
    events: _Events,
    progress: Callable[[float], None] | None,
) -> Branching:
    branching = await Branching.prepare(monitor, disks)
    try:
        await monitor.execute("migrate-set-parameters", {"downtime-limit": _STANDSTILL})
        await begin_writing(monitor, part, live=True)
        await _wait_for("pre-switchover", monitor, events, progress)
    except BaseException:
        with contextlib.suppress(QmpError, TimeLimitError):
            await asyncio.shield(_give_up(monitor, branching))
        raise
    return branching


async def _give_up(monitor: Monitor, branching: Branching) -> None:
    if await under_way(monitor):
        await cancel(monitor)
    await branching.abandon()


async def _switch_over(
    monitor: Monitor, branching: Branching, events: _Events, going: Callable[[], bool]
) -> float:
    """What the guest stands still for."""
    try:
        await branching.commit()
        await monitor.execute("migrate-continue", {"state": "pre-switchover"})
    except BaseException:
        await _give_up(monitor, branching)
        raise
    await _wait_for("completed", monitor, events, None)
    if going():
        await _go_on(monitor)
    return _stood(events)


async def _wait_for(
    status: str,
    monitor: Monitor,
    events: _Events,
    progress: Callable[[float], None] | None,
) -> None:
    """Waits until the migration is so far.

    Raises:
        NoSpaceError, QmpError: it failed.
    """
    seen: list[MonitorEvent] = []
    while True:
        try:
            event = await asyncio.wait_for(events.get(), _LOOK_INTERVAL)
        except TimeoutError:
            answer = await monitor.execute("query-migrate")
            report(answer, progress)
            event = {"event": "MIGRATION", "data": answer}
        match event["event"], event.get("data", {}):
            case "MIGRATION", {"status": "failed" | "cancelled"}:
                raise failure(monitor, "written", await monitor.execute("query-migrate"))
            case "MIGRATION", {"status": reached} if reached == status:
                for one in seen:
                    events.put_nowait(one)
                return
            case "MIGRATION_PASS", {"pass": int(number)} if number > _PASSES:
                longer = _STANDSTILL << min(number - _PASSES, 16)
                await monitor.execute("migrate-set-parameters", {"downtime-limit": longer})
            case "STOP" | "RESUME", _:
                seen.append(event)


async def _go_on(monitor: Monitor) -> None:
    """Lets the guest go on as soon as QEMU, which has written all, is ready for that."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _FINISHING
    while True:
        try:
            await monitor.execute("cont")
            return
        except QmpError as error:
            if "not finalized" not in error.message or loop.time() > deadline:
                raise
        await asyncio.sleep(_FINISHING_INTERVAL)


def _stood(events: _Events) -> float:
    """Seconds from the last stop to the resumption after that, by QEMU's clock; 0 without."""
    moments = {"STOP": 0.0, "RESUME": 0.0}
    while not events.empty():
        event = events.get_nowait()
        if event["event"] in moments:
            stamp = event["timestamp"]
            moments[event["event"]] = stamp["seconds"] + stamp["microseconds"] / 1e6
    return max(moments["RESUME"] - moments["STOP"], 0.0)
