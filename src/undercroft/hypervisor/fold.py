"""Folding: what a disk's top layer has goes into the one beneath it, which is written to from then
on. Costs what was written since the two parted.

The opposite of `undercroft.hypervisor.merge`, and more delicate, as what was the top layer is out
of date as soon as the guest writes again. So the guest stands still from before QEMU goes over to
the lower layer (``block-commit``, which leaves the two alike) until it is written down which one is
the disk: whatever is killed in between, both are right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

from undercroft.hypervisor.bitmaps import GRANULARITY, tidy
from undercroft.hypervisor.blockgraph import block_nodes
from undercroft.hypervisor.merge import cancel_job, drop_node, follow_job, jobs_of, reopen
from undercroft.hypervisor.plan import DiskLayer
from undercroft.hypervisor.qmp import Monitor

__all__ = ["begin_fold", "drop_folded", "end_fold"]

_JOB = "fold"


async def begin_fold(
    monitor: Monitor, layers: Sequence[DiskLayer], keep: Collection[str], fresh: Collection[str]
) -> None:
    """Copies the top layer's content into the second, until that has nearly all; the guest goes on
    and writes to both. ``keep`` and ``fresh`` are the bitmaps that the second layer is to have:
    those that it has, and those that begin with what the top layer has.

    Raises:
        QmpError, TimeLimitError, NoSpaceError, OSError: it did not work; all is as it was.
    """
    upper, lower = layers[0], layers[1]
    if _JOB not in await jobs_of(monitor):
        nodes = await block_nodes(monitor)
        if nodes.get(f"{lower.node}-file", {}).get("ro", True):
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
        await monitor.execute(
            "block-commit",
            {
                "job-id": _JOB,
                "device": upper.node,
                "base-node": lower.node,
                "auto-dismiss": False,
            },
        )
    try:
        await follow_job(monitor, _JOB, until="ready")
    except asyncio.CancelledError:
        await asyncio.shield(cancel_job(monitor, _JOB))
        raise


async def end_fold(monitor: Monitor, layers: Sequence[DiskLayer]) -> None:
    """Has QEMU write to the lower layer. The guest must stand still, and until it is written down
    that this one is the disk.

    Raises:
        QmpError, TimeLimitError, NoSpaceError: it did not work; all is as it was.
    """
    job = (await jobs_of(monitor)).get(_JOB)
    if job is not None:
        if job["status"] == "ready":
            await monitor.execute("job-complete", {"id": _JOB})
        await follow_job(monitor, _JOB)
    # Opening it anew has all written that QEMU may have of it in its memory only.
    below = layers[2].node if len(layers) > 2 else None
    await reopen(monitor, layers[1], write=True, backing=below)


async def drop_folded(monitor: Monitor, layer: DiskLayer) -> None:
    """Closes what was the top layer."""
    await drop_node(monitor, layer.node)
