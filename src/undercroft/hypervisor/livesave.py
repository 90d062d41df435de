"""Saving a guest's state while it goes on.

QEMU writes the memory, and what the guest changes meanwhile again, until so little is left that it
is a matter of milliseconds (as in a live migration). For these the guest stands still: its disks
branch off, the rest is written, and it goes on. State and disks are of the same moment.

A guest that changes its memory faster than that can be written, and one whose changes QEMU misses,
stands still for longer: until all of it is written.
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
_PASSES = 3  # ... after so many passes over it twice as long with each ...
_MOST_PASSES = 8  # ... and after so many it stands still, or it, and the file, might never end
_FINISHING = 30.0  # seconds for QEMU to put away what it needed
_FINISHING_INTERVAL = 0.0005
_WRITING = 300.0  # seconds for the rest to be written, in which QEMU may not answer
# Under emulation older ones miss some of what a guest changes, and say that all is well.
_SEES_CHANGES = (9, 0, 0)


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
    live = plan.accelerator != "tcg" or monitor.version >= _SEES_CHANGES
    try:
        with monitor.watching(*_EVENTS) as events:
            saving = _Saving(monitor, events, going, progress)
            branching = await saving.until_little_is_left(part, disks, live=live)
            over = asyncio.ensure_future(saving.switch_over(branching))
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


class _Saving:
    """A state that is being written. ``stopped``: by us, so that QEMU does not have the guest go on
    by itself if it fails."""

    def __init__(
        self,
        monitor: Monitor,
        events: asyncio.Queue[MonitorEvent],
        going: Callable[[], bool],
        progress: Callable[[float], None] | None,
    ) -> None:
        self._monitor = monitor
        self._events = events
        self._going = going
        self._progress = progress
        self._stopped = False

    async def until_little_is_left(
        self, part: Path, disks: Sequence[PlanDisk], *, live: bool
    ) -> Branching:
        monitor = self._monitor
        branching = await Branching.prepare(monitor, disks)
        try:
            await monitor.execute("migrate-set-parameters", {"downtime-limit": _STANDSTILL})
            if not live:
                await self._stop()
            await begin_writing(monitor, part, live=True)
            await self._wait_for("pre-switchover")
        except BaseException:
            with contextlib.suppress(QmpError, TimeLimitError):
                await asyncio.shield(self._give_up(branching))
            raise
        return branching

    async def switch_over(self, branching: Branching) -> float:
        """What the guest stands still for."""
        try:
            await branching.commit()
            await self._monitor.execute("migrate-continue", {"state": "pre-switchover"})
            self._progress = None
            await self._wait_for("completed", patience=_WRITING)
        except BaseException:
            with contextlib.suppress(QmpError, TimeLimitError):
                await self._give_up(branching)
            raise
        if self._going():
            await self._go_on()
        return _stood(self._events)

    async def _stop(self) -> None:
        if not self._stopped and self._going():
            self._stopped = True
            await self._monitor.execute("stop")

    async def _give_up(self, branching: Branching) -> None:
        if await under_way(self._monitor):
            await cancel(self._monitor)
        if self._going() and (self._stopped or await self._is_over()):
            await self._go_on()
        await branching.abandon()

    async def _is_over(self) -> bool:
        """Whether QEMU was done before it could be stopped, and has the guest stand still."""
        status = await self._monitor.execute("query-status")
        return bool(status["status"] == "postmigrate")

    async def _wait_for(self, status: str, *, patience: float = 0.0) -> None:
        """Waits until the migration is so far. ``patience``: for how many seconds QEMU may not
        answer.

        Raises:
            NoSpaceError, QmpError, TimeLimitError: it failed.
        """
        monitor, events = self._monitor, self._events
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience
        seen: list[MonitorEvent] = []
        while True:
            try:
                event = await asyncio.wait_for(events.get(), _LOOK_INTERVAL)
            except TimeoutError:
                try:
                    answer = await monitor.execute("query-migrate")
                except TimeLimitError:
                    if loop.time() > deadline:
                        raise
                    continue
                report(answer, self._progress)
                event = {"event": "MIGRATION", "data": answer}
            match event["event"], event.get("data", {}):
                case "MIGRATION", {"status": "failed" | "cancelled"}:
                    raise failure(monitor, "written", await monitor.execute("query-migrate"))
                case "MIGRATION", {"status": reached} if reached == status:
                    for one in seen:
                        events.put_nowait(one)
                    return
                case "MIGRATION_PASS", {"pass": int(number)} if number > _MOST_PASSES:
                    await self._stop()
                case "MIGRATION_PASS", {"pass": int(number)} if number > _PASSES:
                    longer = _STANDSTILL << number - _PASSES
                    await monitor.execute("migrate-set-parameters", {"downtime-limit": longer})
                case "STOP" | "RESUME", _:
                    seen.append(event)

    async def _go_on(self) -> None:
        """Lets the guest go on as soon as QEMU, which has written all, is ready for that."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _FINISHING
        while True:
            try:
                await self._monitor.execute("cont")
                return
            except QmpError as error:
                if "not finalized" not in error.message or loop.time() > deadline:
                    raise
            await asyncio.sleep(_FINISHING_INTERVAL)


def _stood(events: asyncio.Queue[MonitorEvent]) -> float:
    """Seconds from the last stop to the resumption after that, by QEMU's clock; 0 without."""
    moments = {"STOP": 0.0, "RESUME": 0.0}
    while not events.empty():
        event = events.get_nowait()
        if event["event"] in moments:
            stamp = event["timestamp"]
            moments[event["event"]] = stamp["seconds"] + stamp["microseconds"] / 1e6
    return max(moments["RESUME"] - moments["STOP"], 0.0)
