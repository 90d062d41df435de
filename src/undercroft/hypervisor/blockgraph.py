"""Disks as graphs of block nodes, with nothing left for QEMU to guess.

Every node states its driver, and every qcow2 node its ``backing`` (null for none), so that a file
name in an image's header is never followed. The files themselves are descriptors.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from undercroft.hypervisor.line import HandleKind, Line
from undercroft.hypervisor.plan import DiskFormat, DiskLayer, PlanDisk
from undercroft.hypervisor.qmp import Monitor
from undercroft.hypervisor.secret import secret_id, take_secret
from undercroft.model.errors import QmpError

__all__ = [
    "add_disk",
    "add_iso",
    "block_nodes",
    "drop_nodes",
    "hand_over",
    "handed_over",
    "layer_nodes",
]

_SET = re.compile(r"/dev/fdset/(\d+)")


def add_disk(line: Line, name: str, disk: PlanDisk) -> str:
    """Adds the graph of a disk; the node for the device to use."""
    write = not disk.read_only
    node = disk.node or name
    backing = _add_chain(line, name, disk.backing)
    top = DiskLayer(path=disk.path, format=disk.format, node=node, key=disk.key, thin=disk.thin)
    _add_layer(line, top, write=write, backing=backing)
    return node


def add_iso(line: Line, name: str, path: str, kind: HandleKind = HandleKind.READ) -> str:
    """Adds a read-only raw image, opened as its ``kind`` says."""
    iso = DiskLayer(path=path, format=DiskFormat.RAW, node=name)
    _add_layer(line, iso, write=False, backing=None, kind=kind)
    return name


def _add_chain(line: Line, name: str, layers: Sequence[DiskLayer]) -> str | None:
    """Adds the layers beneath a disk, deepest first; the node of the nearest, if any."""
    below: str | None = None
    for depth in range(len(layers), 0, -1):
        layer = layers[depth - 1]
        node = layer.node or f"{name}-base{depth}"
        layer = msgspec.structs.replace(layer, node=node)
        _add_layer(line, layer, write=False, backing=below)
        below = node
    return below


def _add_layer(
    line: Line,
    layer: DiskLayer,
    *,
    write: bool,
    backing: str | None,
    kind: HandleKind = HandleKind.READ,
) -> None:
    if layer.key is not None:
        line.secret(layer.node, layer.key)
    name = line.file(layer.node, layer.path, write=write, kind=kind)
    for description in layer_nodes(layer, name, write=write, backing=backing):
        line.blockdev(description)


def layer_nodes(
    layer: DiskLayer | PlanDisk, filename: str, *, write: bool, backing: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The two nodes of a layer: ``NODE-file`` for its file, and ``NODE`` for what that holds. The
    key of an encrypted one is given to QEMU before."""
    node = layer.node
    # A format that is only nearly one of ours must not slip past the comparison below: a qcow2
    # node without its "backing" would follow what the image's header says.
    format = DiskFormat(layer.format)
    file: dict[str, Any] = {
        "driver": "file",
        "node-name": f"{node}-file",
        "filename": filename,
        "read-only": not write,
        "aio": "threads",
        "cache": {"direct": False, "no-flush": False},
        # At the end of each migration, also of one into a file here, QEMU would throw the file out
        # of the host's memory, for other hosts' writes to be seen: 30 ms that the guest stands.
        "drop-cache": False,
    }
    top: dict[str, Any] = {
        "driver": format.value,
        "node-name": node,
        "file": f"{node}-file",
        "read-only": not write,
    }
    if layer.key is not None:
        top["encrypt"] = {"format": "luks", "key-secret": secret_id(node)}
    if write and layer.thin:
        # A guest's TRIM gives the space back to the host, and a page of zeroes takes none.
        file["discard"] = "unmap"
        top["discard"] = "unmap"
        top["detect-zeroes"] = "unmap"
    if format is DiskFormat.QCOW2:
        top["backing"] = backing
    return file, top


async def hand_over(
    monitor: Monitor, path: str, access: int, number: int | None = None, name: str | None = None
) -> int:
    """Opens a file and gives it to a QEMU that runs, in an fdset (a new one without ``number``);
    the set's number. ``name``: the node that it is for.

    Raises:
        OSError, QmpError: it did not work.
    """
    descriptor = os.open(path, access | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        return await monitor.add_to_set(descriptor, number, name)
    finally:
        os.close(descriptor)


async def block_nodes(monitor: Monitor) -> dict[str, dict[str, Any]]:
    """What QEMU says of its block nodes, by their names."""
    answer = await monitor.execute("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in answer}


async def drop_nodes(monitor: Monitor, nodes: Iterable[str]) -> None:
    """Closes those of these layers that are there, which no device has any more, and what was
    handed over for them, also if a daemon died before they were opened.

    Raises:
        QmpError: one is in use.
    """
    nodes = list(nodes)
    known = await block_nodes(monitor)
    for node in nodes:
        for name in (node, f"{node}-file"):
            if name in known:
                await monitor.execute("blockdev-del", {"node-name": name})
                await take_secret(monitor, name)
    left = await block_nodes(monitor)
    sets = await handed_over(monitor)
    useless = _sets(known.values()) | {n for n, name in sets.items() if name in nodes}
    for number in useless - _sets(left.values()):
        with contextlib.suppress(QmpError):
            await monitor.remove_set(number)


async def handed_over(monitor: Monitor) -> dict[int, str]:
    """The node that each fdset was for, as far as that was said."""
    found = {}
    for given in await monitor.execute("query-fdsets"):
        names = [str(item.get("opaque", "")).partition(":")[0] for item in given["fds"]]
        found[given["fdset-id"]] = names[0] if names else ""
    return found


def _sets(nodes: Iterable[dict[str, Any]]) -> set[int]:
    found = (_SET.fullmatch(str(node.get("file", ""))) for node in nodes)
    return {int(match[1]) for match in found if match is not None}
