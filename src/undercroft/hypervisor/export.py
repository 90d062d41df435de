"""Serving a disk that no guest writes to, on a unix socket (NBD), by a QEMU without a machine."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from undercroft.hypervisor import sockets
from undercroft.hypervisor.bitmaps import union
from undercroft.hypervisor.emulator import Emulator
from undercroft.hypervisor.merge import offline
from undercroft.hypervisor.plan import DiskLayer

__all__ = ["CHANGED", "Export", "exported"]

NAME = "disk"
CHANGED = "changed"
"""The bitmap of what has changed."""
_SOCKET = "nbd.sock"


@dataclass(frozen=True)
class Export:
    """A disk that is served at ``socket`` as `NAME`; ``why`` it cannot be told what of it has
    changed (None: it can, as the bitmap `CHANGED`)."""

    socket: Path
    name: str = NAME
    why: str | None = "nobody asked"


@contextlib.asynccontextmanager
async def exported(
    layers: Sequence[DiskLayer],
    emulator: Emulator,
    directory: Path,
    mark: Path,
    uid: int | None,
    *,
    since: tuple[str, int] | None = None,
    write: bool = False,
) -> AsyncIterator[Export]:
    """Serves a chain of layers inside the block. ``directory`` is for sockets, and nobody else's;
    ``mark`` and ``uid`` as for `offline`. ``since``: the name of bitmaps, and how many layers from
    the top have one, which together tell what has changed. ``write``: to be written to, too.

    Raises:
        QmpError, TimeLimitError, OSError: it does not start, or cannot open the disk.
    """
    async with offline(layers, emulator, mark, uid, write=write) as monitor:
        why: str | None = "nobody asked"
        if since is not None:
            name, count = since
            why = await union(monitor, layers[:count], name, CHANGED)
        path = directory / _SOCKET
        listener = sockets.listen(path)
        try:
            await monitor.give(listener.fileno(), "nbd")
        finally:
            listener.close()
        await monitor.execute(
            "nbd-server-start",
            {"addr": {"type": "fd", "data": {"str": "nbd"}}, "max-connections": 16},
        )
        export: dict[str, object] = {
            "type": "nbd",
            "id": NAME,
            "name": NAME,
            "node-name": layers[0].node,
            "writable": write,
        }
        if why is None:
            export["bitmaps"] = [CHANGED]
        await monitor.execute("block-export-add", export)
        yield Export(path, why=why)
