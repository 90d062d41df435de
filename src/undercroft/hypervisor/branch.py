"""Branching off: a running guest's disks are written to new files from one moment on.

The files that were written to until then stay as they were at that moment, whole and unchanged,
and become what the new ones lie on (QEMU: ``blockdev-snapshot`` in a ``transaction``).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

from undercroft.hypervisor.blockgraph import hand_over, layer_nodes
from undercroft.hypervisor.plan import PlanDisk, unit_of
from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.secret import give_secret, take_secret
from undercroft.model.errors import QmpError

__all__ = ["Branching", "branch", "written_nodes"]


async def written_nodes(monitor: Monitor, disks: Sequence[PlanDisk]) -> list[str]:
    """The nodes that these disks of the guest are written to.

    Raises:
        QmpError: there is no such disk.
    """
    found: dict[str, str] = {}
    for device in await monitor.execute("query-block"):
        for part in str(device.get("qdev", "")).split("/"):
            if "inserted" in device:
                found[part] = device["inserted"]["node-name"]
    try:
        return [found[f"disk{unit_of(disk, index)}-dev"] for index, disk in enumerate(disks)]
    except KeyError as missing:
        raise QmpError(f"QEMU of {monitor.name} has no {missing}") from None


class Branching:
    """Disks that are about to be written to other files: those are open, and wait."""

    def __init__(self, monitor: Monitor, disks: Sequence[PlanDisk], nodes: Sequence[str]) -> None:
        self._monitor = monitor
        self._disks = disks
        self._nodes = nodes  # that are written to until now
        self._sets: dict[str, int] = {}

    @classmethod
    async def prepare(cls, monitor: Monitor, disks: Sequence[PlanDisk]) -> Branching:
        """Opens the files that ``disks`` say, but those that are written to already.

        Raises:
            QmpError, OSError: it did not work; nothing is left of it.
        """
        branching = cls(monitor, disks, await written_nodes(monitor, disks))
        try:
            await _forget(monitor, [disk.node for _, disk in branching._moving])
            for _, disk in branching._moving:
                branching._sets[disk.node] = await _open(monitor, disk)
        except BaseException:
            await branching.abandon()
            raise
        return branching

    @property
    def _moving(self) -> list[tuple[str, PlanDisk]]:
        pairs = zip(self._nodes, self._disks, strict=True)
        return [(old, disk) for old, disk in pairs if old != disk.node]

    async def commit(self) -> None:
        """Has the guest write to them from now on, to all from the same moment.

        Raises:
            QmpError, TimeLimitError: QEMU refuses, or does not tell.
        """
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": old, "overlay": disk.node}}
            for old, disk in self._moving
        ]
        if actions:
            await self._monitor.execute("transaction", {"actions": actions})

    async def abandon(self) -> None:
        """Closes them again, unless the guest writes to them."""
        if not self._moving or not self._monitor.connected:
            return
        if await written_nodes(self._monitor, self._disks) == self._nodes:
            await _forget(self._monitor, list(self._sets))
            for number in self._sets.values():
                with contextlib.suppress(QmpError):
                    await self._monitor.remove_set(number)


async def branch(monitor: Monitor, disks: Sequence[PlanDisk]) -> None:
    """Has every disk written to the file that ``disks`` say, all from the same moment on. Those
    that are written to that file already are left alone.

    Raises:
        QmpError, OSError: it did not work; all disks are written to where they were.
    """
    branching = await Branching.prepare(monitor, disks)
    try:
        await branching.commit()
    except BaseException:
        await branching.abandon()
        raise


async def _open(monitor: Monitor, disk: PlanDisk) -> int:
    """Opens the new file of a disk as a node of its own; the number of its fdset."""
    number = await hand_over(monitor, disk.path, os.O_RDONLY)
    await hand_over(monitor, disk.path, os.O_RDWR, number)
    file, top = layer_nodes(disk, f"/dev/fdset/{number}", write=True, backing=None)
    await give_secret(monitor, disk.node, disk.key)
    await monitor.execute("blockdev-add", file)
    await monitor.execute("blockdev-add", top)
    return number


async def _forget(monitor: Monitor, nodes: Sequence[str]) -> None:
    """Removes nodes that nothing uses, also those that an interrupted attempt left."""
    known: set[str] = set()
    if nodes:
        answer: list[dict[str, Any]] = await monitor.execute("query-named-block-nodes", {})
        known = {node["node-name"] for node in answer}
    for node in nodes:
        for name in (node, f"{node}-file"):
            if name in known:
                await monitor.execute("blockdev-del", {"node-name": name})
                await take_secret(monitor, name)
