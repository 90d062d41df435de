"""Blocking work in threads that can be told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["Stop", "Stopped", "in_thread"]

T = TypeVar("T")


class Stopped(Exception):
    """Raised inside the thread by `Stop.check`."""


class Stop:
    """Tells a thread that nobody waits for its result any more."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._actions: list[Callable[[], None]] = []

    def check(self) -> None:
        """Raises `Stopped` once the work is to stop; call it every few milliseconds of work."""
        if self._event.is_set():
            raise Stopped

    def wait(self, seconds: float) -> None:
        """Sleeps, unless the work is to stop: then it raises `Stopped`."""
        self._event.wait(seconds)
        self.check()

    def also(self, action: Callable[[], None]) -> None:
        """Has the action done, in the stopping thread, to wake up work that is blocked."""
        self._actions.append(action)

    def set(self) -> None:
        """Asks the work to stop."""
        self._event.set()
        for action in list(self._actions):
            with contextlib.suppress(OSError):
                action()


async def in_thread(work: Callable[[Stop], T]) -> T:
    """Runs the work in a thread. A cancelled caller returns only after the thread has stopped, so
    that nothing is still writing when it cleans up."""
    stop = Stop()
    running = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # looked at, so that asyncio does not complain
        raise
