"""Writing the state of a guest that stands still."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec

from undercroft.hypervisor.migration import follow, under_way, write_to
from undercroft.hypervisor.plan import MachinePlan
from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.state_file import part_path, publish_state
from undercroft.model.errors import NoSpaceError, QmpError

__all__ = ["alone", "make_savable", "save_devices", "save_state"]


def alone(plan: MachinePlan) -> MachinePlan:
    """The plan for who reads a state that has all of the memory: no file of it is shared."""
    return msgspec.structs.replace(plan, incoming=None, memory_file=None, memory_shared=False)


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
    part = part_path(path)
    try:
        if not await _written_already(monitor, part, progress):
            await make_savable(monitor)  # there is no file, so the guest may go on for a moment
            await write_to(monitor, part, progress)
        await asyncio.to_thread(publish_state, part, path, alone(plan))
    except OSError as error:
        raise NoSpaceError(f"the state of vm {plan.name} cannot be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


async def make_savable(monitor: Monitor) -> None:
    """Sees to it that the state of a guest that stands still can be written. QEMU does not do that
    twice in a row: it may have to go on for a moment.

    Raises:
        QmpError, TimeLimitError: it did not work.
    """
    if (await monitor.execute("query-status"))["status"] == "postmigrate":
        await monitor.execute("cont")
        await monitor.execute("stop")


async def save_devices(monitor: Monitor, plan: MachinePlan, path: Path) -> None:
    """Writes the state of a guest that has not run since it was loaded, all but its memory, which
    is a file that QEMU shares (``plan.memory_shared``).

    Raises:
        QmpError, TimeLimitError, OSError: it did not work; there is no file.
    """
    part = part_path(path)
    try:
        await _forget_networks(monitor, plan)
        await write_to(monitor, part, None, apart=True)
        await asyncio.to_thread(publish_state, part, path, plan)
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
    if await under_way(monitor):
        with contextlib.suppress(QmpError):
            await follow(monitor, "written", progress)
    status = (await monitor.execute("query-status"))["status"]
    migration = (await monitor.execute("query-migrate")).get("status")
    return status == "postmigrate" and migration == "completed" and part.exists()
