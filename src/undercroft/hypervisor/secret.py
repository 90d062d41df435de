"""The keys of encrypted layers, as QEMU is handed them.

They are never part of a command line: one that QEMU starts with is in a file that exists in memory
only and is handed over as a descriptor; one that it gets later comes over its private monitor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import QmpError

__all__ = ["give_secret", "open_secret", "secret_id", "take_secret"]


def secret_id(node: str) -> str:
    """What QEMU calls the key of a node."""
    return f"{node}-key"


def open_secret(path: str, uid: int | None, gid: int | None) -> int:
    """A descriptor of a key, which this user can open again by ``/dev/fd/N``. Blocks.

    Raises:
        OSError: there is no such key.
    """
    key = Path(path).read_bytes()
    descriptor = os.memfd_create("key", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, key)
        os.fchmod(descriptor, 0o400)
        if uid is not None:
            os.fchown(descriptor, uid, uid if gid is None else gid)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


async def give_secret(monitor: Monitor, node: str, path: str | None) -> None:
    """Gives QEMU the key of a node, if it has one. May be repeated.

    Raises:
        QmpError, TimeLimitError, OSError: it did not work.
    """
    if path is None:
        return
    key = await asyncio.to_thread(Path(path).read_text)
    await take_secret(monitor, node)
    arguments = {"qom-type": "secret", "id": secret_id(node), "data": key, "format": "raw"}
    await monitor.execute("object-add", arguments)


async def take_secret(monitor: Monitor, node: str) -> None:
    """Has QEMU forget the key of a node that it has closed, or is about to open."""
    with contextlib.suppress(QmpError):
        await monitor.execute("object-del", {"id": secret_id(node)})
