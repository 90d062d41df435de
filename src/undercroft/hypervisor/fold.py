"""Folding: what a disk's top layer has goes into the one beneath it, which is written to from then
on. Costs what was written since the two parted.

The opposite of `undercroft.hypervisor.merge`, and more delicate, as what was the top layer is out
of date as soon as the guest writes again. So the guest stands still from before QEMU goes over to
the lower layer (``block-commit``, which leaves the two alike) until it is written down which one is
the disk: whatever is killed in between, both are right.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Callable, Collection, Sequence

from undercroft.hypervisor.bitmaps import GRANULARITY, tidy
from undercroft.hypervisor.blockgraph import block_nodes
from undercroft.hypervisor.merge import (
    FOLD,
    begun,
    cancel_job,
    drop_node,
    follow_job,
    jobs_of,
    reads_only,
    reopen,
)
from undercroft.hypervisor.plan import DiskLayer
from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import QmpError

__all__ = ["begin_fold", "drop_folded", "end_fold"]

_LAYER = re.compile(r"layer-\w+\.\d+")  # not the node of its file


async def begin_fold(
    monitor: Monitor,
    layers: Sequence[DiskLayer],
    keep: Collection[str],
    fresh: Collection[str],
    progress: Callable[[float], None] | None = None,
) -> None:
    """Copies the top layer's content into the second, until that has nearly all; the guest goes on
    and writes to both. ``keep`` and ``fresh`` are the bitmaps that the second layer is to have:
    those that it has, and those that begin with what the top layer has.

    Raises:
        QmpError, TimeLimitError, NoSpaceError, OSError: it did not work; all is as it was.
    """
    upper, lower = layers[0], layers[1]
    job = FOLD + upper.node
    commit = not await begun(monitor, job)
    if commit:
        nodes = await block_nodes(monitor)
        if reads_only(nodes, lower):
            below = layers[2].node if len(layers) > 2 else None
            await reopen(monitor, lower, write=True, backing=below)
        left = await tidy(monitor, lower.node, {*keep, *fresh})
        for name in fresh:
            if name not in left:
                await monitor.execute(
                    "block-dirty-bitmap-add",
                    {
                        "node": lower.node,
                        "name": name,
                        "granularity": GRANULARITY,
                        "persistent": True,
                    },
                )
    try:
        if commit:
            await monitor.execute(
                "block-commit",
                {
                    "job-id": job,
                    "device": upper.node,
                    "base-node": lower.node,
                    "auto-dismiss": False,
                },
            )
        await follow_job(monitor, job, progress, until="ready")
    except asyncio.CancelledError:
        await asyncio.shield(cancel_job(monitor, job))
        raise


async def end_fold(monitor: Monitor, layers: Sequence[DiskLayer]) -> None:
    """Has QEMU write to the lower layer. The guest must stand still, and until it is written down
    that this one is the disk.

    Raises:
        QmpError, TimeLimitError, NoSpaceError: it did not work; all is as it was.
    """
    name = FOLD + layers[0].node
    job = (await jobs_of(monitor)).get(name)
    if job is not None:
        if job["status"] == "ready":
            await monitor.execute("job-complete", {"id": name})
        await follow_job(monitor, name)
    # Opening it anew has all written that QEMU may have of it in its memory only.
    below = layers[2].node if len(layers) > 2 else None
    await reopen(monitor, layers[1], write=True, backing=below)


async def drop_folded(monitor: Monitor, keep: Collection[str]) -> None:
    """Closes what were top layers: all but the nodes to ``keep``, which are those that the disks
    have now."""
    for node in await block_nodes(monitor):
        if _LAYER.fullmatch(node) and node not in keep:
            with contextlib.suppress(QmpError):  # something lies on it after all
                await drop_node(monitor, node)
