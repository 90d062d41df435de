"""Disks as graphs of block nodes, with nothing left for QEMU to guess.

Every node states its driver, and every qcow2 node its ``backing`` (null for none), so that a file
name in an image's header is never followed. The files themselves are descriptors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from undercroft.hypervisor.line import Line
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, PlanDisk
from undercroft.hypervisor.qmp import Monitor

__all__ = ["add_disk", "add_iso", "block_nodes", "hand_over", "layer_nodes"]


def add_disk(line: Line, name: str, disk: PlanDisk) -> str:
    """Adds the graph of a disk; the node for the device to use."""
    write = not disk.read_only
    node = disk.node or name
    backing = _add_chain(line, name, disk.backing)
    _add_layer(line, node, disk.path, disk.format, write=write, backing=backing)
    return node


def add_iso(line: Line, name: str, path: str) -> str:
    """Adds a read-only raw image."""
    _add_layer(line, name, path, DiskFormat.RAW, write=False, backing=None)
    return name


def _add_chain(line: Line, name: str, layers: Sequence[DiskLayer]) -> str | None:
    """Adds the layers beneath a disk, deepest first; the node of the nearest, if any."""
    below: str | None = None
    for depth in range(len(layers), 0, -1):
        layer = layers[depth - 1]
        node = layer.node or f"{name}-base{depth}"
        _add_layer(line, node, layer.path, layer.format, write=False, backing=below)
        below = node
    return below


def _add_layer(
    line: Line, node: str, path: str, format: DiskFormat, *, write: bool, backing: str | None
) -> None:
    name = line.file(node, path, write=write)
    for description in layer_nodes(node, name, format, write=write, backing=backing):
        line.blockdev(description)


def layer_nodes(
    node: str, filename: str, format: DiskFormat, *, write: bool, backing: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two nodes of a layer: ``NODE-file`` for its file, and ``NODE`` for what that holds."""
    # A format that is only nearly one of ours must not slip past the comparison below: a qcow2
    # node without its "backing" would follow what the image's header says.
    format = DiskFormat(format)
    file: dict[str, Any] = {
        "driver": "file",
        "node-name": f"{node}-file",
        "filename": filename,
        "read-only": not write,
        "aio": "threads",
        "cache": {"direct": False, "no-flush": False},
    }
    top: dict[str, Any] = {
        "driver": format.value,
        "node-name": node,
        "file": f"{node}-file",
        "read-only": not write,
    }
    if write:
        # A guest's TRIM gives the space back to the host, and a page of zeroes takes none.
        file["discard"] = "unmap"
        top["discard"] = "unmap"
        top["detect-zeroes"] = "unmap"
    if format is DiskFormat.QCOW2:
        top["backing"] = backing
    return file, top


async def hand_over(monitor: Monitor, path: str, access: int, number: int | None = None) -> int:
    """Opens a file and gives it to a QEMU that runs, in an fdset (a new one without ``number``);
    the set's number.

    Raises:
        OSError, QmpError: it did not work.
    """
    descriptor = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return await monitor.add_to_set(descriptor, number)
    finally:
        os.close(descriptor)


async def block_nodes(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """What QEMU says of its block nodes, by their names."""
    answer = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in answer}
