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

__all__ = ["branch", "written_nodes"]


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


async def branch(monitor: Monitor, disks: Sequence[PlanDisk]) -> None:
    """Has every disk written to the file that ``disks`` say, all from the same moment on. Those
    that are written to that file already are left alone.

    Raises:
        QmpError, OSError: it did not work; all disks are written to where they were.
    """
    nodes = await written_nodes(monitor, disks)
    moving = [(old, disk) for old, disk in zip(nodes, disks, strict=True) if old != disk.node]
    sets: dict[str, int] = {}
    try:
        await _forget(monitor, [disk.node for _, disk in moving])
        for _, disk in moving:
            sets[disk.node] = await _open(monitor, disk)
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": old, "overlay": disk.node}}
            for old, disk in moving
        ]
        if actions:
            await monitor.execute("transaction", {"actions": actions})
    except BaseException:
        if monitor.connected and moving and await written_nodes(monitor, disks) == nodes:
            await _forget(monitor, list(sets))
            for number in sets.values():
                with contextlib.suppress(QmpError):
                    await monitor.remove_set(number)
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
