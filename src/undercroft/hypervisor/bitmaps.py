"""Dirty bitmaps: what of a layer has been written to since a checkpoint.

They are kept in the layers' files (qcow2) and written there when QEMU closes them or goes on to
another layer; one that QEMU did not come to write (it was killed) is marked as such and useless.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from undercroft.hypervisor.blockgraph import block_nodes
from undercroft.hypervisor.plan import DiskLayer
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import QmpError

__all__ = ["copy_up", "drop_useless", "tidy", "union", "usable"]

GRANULARITY = 64 << 10


async def bitmaps(monitor: Monitor, node: str) -> dict[str, dict[str, Any]]:
    """The bitmaps of a node as QEMU has them, by their names."""
    described = (await block_nodes(monitor)).get(node, {})
    return {one["name"]: one for one in described.get("dirty-bitmaps", ()) if one.get("name")}


def usable(bitmap: dict[str, Any] | None) -> bool:
    """Whether what a bitmap says is all there is to say."""
    return bitmap is not None and not bitmap.get("inconsistent", False)


async def union(monitor: Monitor, layers: Sequence[DiskLayer], name: str, into: str) -> str | None:
    """Makes a passing bitmap ``into`` of the topmost layer, of what all these layers have under a
    name. Returns why it cannot be, or None.

    Raises:
        QmpError: QEMU refuses.
    """
    for layer in layers:
        if not usable((await bitmaps(monitor, layer.node)).get(name)):
            return "QEMU was killed since, so what it had marked is lost"
    sources = [{"node": layer.node, "name": name} for layer in layers]
    sizes = {found["image"]["virtual-size"] for found in await _described(monitor, layers)}
    if len(sizes) > 1:  # QEMU merges only those of one size
        return "the disk has grown since"
    top = layers[0].node
    await monitor.execute(
        "block-dirty-bitmap-add",
        {"node": top, "name": into, "granularity": GRANULARITY, "disabled": True},
    )
    await monitor.execute(
        "block-dirty-bitmap-merge", {"node": top, "target": into, "bitmaps": sources}
    )
    return None


async def _described(monitor: Monitor, layers: Sequence[DiskLayer]) -> list[dict[str, Any]]:
    nodes = await block_nodes(monitor)
    return [nodes[layer.node] for layer in layers]


async def tidy(monitor: Monitor, node: str, wanted: Collection[str]) -> dict[str, dict[str, Any]]:
    """Removes the bitmaps of a writable node that nobody wants or that are useless; those left."""
    left: dict[str, dict[str, Any]] = {}
    for name, bitmap in (await bitmaps(monitor, node)).items():
        if name in wanted and usable(bitmap):
            left[name] = bitmap
        elif not bitmap.get("busy", False):
            await monitor.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
    return left


async def drop_useless(monitor: Monitor, node: str) -> None:
    """Removes the bitmaps of a writable node that a killed QEMU left."""
    await tidy(monitor, node, await bitmaps(monitor, node))


async def copy_up(monitor: Monitor, upper: str, lower: str, fresh: Collection[str]) -> None:
    """Adds to the bitmaps of a writable node what those of the same names of the one beneath it
    say, which is about to be merged into it. One that cannot be, is removed: it would be wrong.
    ``fresh`` ones began with the upper layer, and stay as they are."""
    below = await bitmaps(monitor, lower)
    for name, bitmap in (await bitmaps(monitor, upper)).items():
        source = below.get(name)
        if name in fresh:
            continue
        if usable(bitmap) and usable(source):
            try:
                await monitor.execute(
                    "block-dirty-bitmap-merge",
                    {"node": upper, "target": name, "bitmaps": [{"node": lower, "name": name}]},
                )
                continue
            except QmpError:
                pass
        await monitor.execute("block-dirty-bitmap-remove", {"node": upper, "name": name})
