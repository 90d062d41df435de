"""What is in a CD-ROM drive, and how it is exchanged while the guest runs.

A medium is a file of the user's, which the daemon opens and QEMU is handed for reading: always raw,
whatever it looks like. It may be shared by any number of machines.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import stat
from dataclasses import dataclass

from undercroft.hypervisor.blockgraph import block_nodes, drop_nodes, handed_over, layer_nodes
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, PlanCdrom
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.disc import DISC_AT, DISC_SIZE, is_disc
from undercroft.model.errors import (
    InUseError,
    InvalidError,
    NotFoundError,
    QmpError,
    TimeLimitError,
)

__all__ = ["TRAY_TIMEOUT", "change_medium", "check_medium", "open_medium"]

TRAY_TIMEOUT = 5.0  # seconds that a guest gets to unlock a drive that it is asked to open
_POLL = 0.1


def open_medium(path: str) -> int:
    """Opens a file that is to be in a drive; its descriptor.

    Raises:
        NotFoundError: there is none. InvalidError: it cannot be read, or is no image of a disc.
    """
    try:
        # What is no file must not keep us waiting before that is known.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no file {path}", object=path) from None
    except OSError as error:
        raise InvalidError(f"{path} cannot be read: {error.strerror}", object=path) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InvalidError(f"{path} is not a plain file", object=path)
        if not _is_disc(descriptor, path):
            raise InvalidError(
                f"{path} is not an image of a disc (ISO 9660 or UDF)",
                object=path,
                action="images of disks are for: croft image import, croft import",
            )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check_medium(path: str) -> None:
    """Does nothing if a file can be in a drive.

    Raises:
        NotFoundError, InvalidError: see `open_medium`.
    """
    os.close(open_medium(path))


def _is_disc(descriptor: int, path: str) -> bool:
    try:
        return is_disc(os.pread(descriptor, DISC_SIZE, DISC_AT))
    except OSError as error:
        raise InvalidError(f"{path} cannot be read: {error.strerror}", object=path) from error


@dataclass(frozen=True)
class _Drive:
    node: str | None
    tray_open: bool


async def change_medium(
    monitor: Monitor, drive: PlanCdrom, *, force: bool = False, timeout: float = TRAY_TIMEOUT
) -> None:
    """Has a drive hold what ``drive`` says, under a name (``node``) that nothing else had before,
    in place of what it holds. May be repeated. ``force``: also if the guest has locked it.

    Raises:
        NotFoundError, InvalidError: the file cannot be used. InUseError: the guest has locked the
        drive. QmpError, TimeLimitError: QEMU does not. The drive holds what it held.
    """
    id = f"cd{drive.unit}-dev"
    before = await _look(monitor, id)
    wanted = drive.node if drive.path is not None else None
    if before.node != wanted:
        try:
            if drive.path is not None:
                await _open(monitor, drive, drive.path)
            await _open_tray(monitor, id, force, timeout)
            if before.node is not None:
                await monitor.execute("blockdev-remove-medium", {"id": id})
            if wanted is not None:
                arguments = {"id": id, "node-name": wanted}
                await monitor.execute("blockdev-insert-medium", arguments)
        except BaseException:
            if monitor.connected:
                with contextlib.suppress(QmpError, TimeLimitError):
                    await asyncio.shield(_put_back(monitor, drive.unit, before))
            raise
    await monitor.execute("blockdev-close-tray", {"id": id})
    await _tidy(monitor, drive.unit, wanted)


async def _look(monitor: Monitor, id: str) -> _Drive:
    for entry in await monitor.execute("query-block"):
        if id in str(entry.get("qdev", "")).split("/"):
            inserted = entry.get("inserted")
            return _Drive(
                node=inserted["node-name"] if inserted else None,
                tray_open=bool(entry.get("tray_open")),
            )
    raise QmpError(f"QEMU of {monitor.name} has no {id}")


async def _open(monitor: Monitor, drive: PlanCdrom, path: str) -> None:
    """Opens a medium as a node of its own, which no drive holds yet."""
    descriptor = await asyncio.to_thread(open_medium, path)
    try:
        await _tidy(monitor, drive.unit, (await _look(monitor, f"cd{drive.unit}-dev")).node)
        number = await monitor.add_to_set(descriptor, name=drive.node)
    finally:
        os.close(descriptor)
    layer = DiskLayer(path=path, format=DiskFormat.RAW, node=drive.node)
    try:
        for node in layer_nodes(layer, f"/dev/fdset/{number}", write=False, backing=None):
            await monitor.execute("blockdev-add", node)
    except BaseException:
        if monitor.connected:
            with contextlib.suppress(QmpError, TimeLimitError):
                await asyncio.shield(monitor.remove_set(number))
        raise


async def _open_tray(monitor: Monitor, id: str, force: bool, timeout: float) -> None:
    """Opens the tray; of a guest that has locked it, that is asked."""
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        await monitor.execute("blockdev-open-tray", {"id": id, "force": force})
    except QmpError as error:
        if "locked" not in str(error):
            raise
    while not (await _look(monitor, id)).tray_open:
        if asyncio.get_running_loop().time() > deadline:
            raise InUseError(
                f"the guest of {monitor.name} uses the disc, and has locked the drive",
                action="unmount it in the guest, then try again; or take it away with --force",
            )
        await asyncio.sleep(_POLL)


async def _put_back(monitor: Monitor, unit: int, before: _Drive) -> None:
    """Has a drive hold what it held."""
    id = f"cd{unit}-dev"
    now = await _look(monitor, id)
    if now.node != before.node:
        if now.node is not None:
            await monitor.execute("blockdev-remove-medium", {"id": id})
        if before.node is not None:
            await monitor.execute("blockdev-insert-medium", {"id": id, "node-name": before.node})
    if now.tray_open and not before.tray_open:
        await monitor.execute("blockdev-close-tray", {"id": id})
    await _tidy(monitor, unit, before.node)


async def _tidy(monitor: Monitor, unit: int, keep: str | None) -> None:
    """Closes all media that the drive has had, but one."""
    names = {name.removesuffix("-file") for name in await block_nodes(monitor)}
    names |= set((await handed_over(monitor)).values())
    own = re.compile(rf"cd{unit}(-[0-9a-z]+)?")
    await drop_nodes(monitor, sorted(n for n in names if own.fullmatch(n) and n != keep))
