"""Backups that leave through a pipe: made as fast as they are taken, kept nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

from undercroft.host.backing_up import Backing
from undercroft.host.environment import Environment
from undercroft.model.checkpoint import Checkpoint
from undercroft.model.vm import VM
from undercroft.storage.backup.archive import ArchiveWriter
from undercroft.storage.threads import in_thread

_PIECE = 256 << 10


async def stream_backup(
    environment: Environment, vm: VM, checkpoint: Checkpoint, id: str, description: str
) -> AsyncIterator[bytes]:
    """An archive (`undercroft.storage.backup.archive`) of what an open checkpoint holds. If it ends
    with an error it has no manifest.

    Raises:
        UndercroftError: it cannot be read.
    """
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    making = asyncio.create_task(_make(environment, vm, checkpoint, id, description, theirs))
    try:
        loop = asyncio.get_running_loop()
        while piece := await loop.sock_recv(ours, _PIECE):
            yield piece
        await making
    finally:
        ours.close()  # whoever still writes is told so
        making.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await making


async def _make(
    environment: Environment,
    vm: VM,
    checkpoint: Checkpoint,
    id: str,
    description: str,
    out: socket.socket,
) -> None:
    try:
        writer = ArchiveWriter(out.sendall)
        backing = Backing(environment, vm, checkpoint, id, description)
        await backing.put(writer, None, None, lambda done, phase: None, environment.tmp)
        backup = await backing.manifest(None, True, "it goes through a pipe", writer.written)
        await in_thread(lambda _: writer.finish(backup))
    finally:
        out.close()
