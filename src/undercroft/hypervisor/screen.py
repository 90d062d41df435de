"""The display: as a picture, and as a VNC connection."""

from __future__ import annotations

import asyncio
import os
import socket

from undercroft.hypervisor.qmp import Monitor
from undercroft.model.errors import UnsupportedError

__all__ = ["open_vnc", "take_screenshot"]

_LARGEST = 256 << 20  # bytes of a picture; QEMU may be in the hands of its guest


def _need_display(monitor: Monitor, display: bool) -> None:
    if not display:
        raise UnsupportedError(
            f"{monitor.name} has no display",
            object=monitor.name,
            action="set display to std or virtio, and start it again; or use its serial console",
        )


async def take_screenshot(monitor: Monitor, display: bool) -> bytes:
    """The display as PNG.

    Raises:
        UnsupportedError: there is none.
        QmpError, TimeLimitError: QEMU did not draw it.
    """
    _need_display(monitor, display)
    memory = os.memfd_create("screenshot", os.MFD_CLOEXEC)
    try:
        # QEMU wants a descriptor that can be written only, and takes no other.
        writer = os.open(f"/proc/self/fd/{memory}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            number = await monitor.add_to_set(writer)
        finally:
            os.close(writer)
        try:
            arguments = {"filename": f"/dev/fdset/{number}", "format": "png"}
            await monitor.execute("screendump", arguments)
        finally:
            await monitor.remove_set(number)
        size = min(os.fstat(memory).st_size, _LARGEST)
        return await asyncio.to_thread(os.pread, memory, size, 0)
    finally:
        os.close(memory)


async def open_vnc(monitor: Monitor, display: bool) -> socket.socket:
    """Our end of a new VNC connection.

    Raises:
        UnsupportedError: there is no display.
        QmpError, TimeLimitError: QEMU did not take it.
    """
    _need_display(monitor, display)
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await monitor.give(theirs.fileno(), "vnc")
        await monitor.execute("add_client", {"protocol": "vnc", "fdname": "vnc", "skipauth": True})
    except BaseException:
        ours.close()
        raise
    ours.setblocking(False)
    return ours
