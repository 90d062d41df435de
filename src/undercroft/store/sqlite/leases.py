"""Leases: deadlines in memory, existence on disk.

Keeping a lease costs no write: its deadline is only known to the running store, by the monotonic
clock, which says nothing across a restart. After a restart every lease begins its time anew: nobody
could keep one while the store was away, so ending them at once would remove what belongs to
holders that are alive and well. A dead holder's is thus kept for one time to live longer.
"""

from __future__ import annotations

import asyncio
import functools
import math
import secrets
from collections.abc import Callable, Mapping

from undercroft.model.errors import ConflictError, InvalidError

LOOK = 3600.0  # seconds: event loops do not take just any delay
RETRY = 1.0  # seconds, if a lease could not be ended (disk full)


class Leases:
    """All leases of a store. ``end`` submits the transaction that ends one."""

    def __init__(
        self,
        clock: Callable[[], float],
        end: Callable[[str], asyncio.Future[int]],
        written: Mapping[str, float],
    ) -> None:
        self._clock = clock
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._retries: list[asyncio.TimerHandle] = []
        self._closed = False
        now = clock()
        self._deadlines = {id: now + ttl for id, ttl in written.items()}
        self._arm()

    def begin(self, id: str, ttl: float) -> SQLiteLease:
        """A lease that has been written down."""
        self._deadlines[id] = self._clock() + ttl
        self._arm()
        return SQLiteLease(self, id, ttl)

    def keep(self, id: str, ttl: float) -> None:
        """Begins its time anew; raises `ConflictError` if it has ended."""
        self.check(id)
        self._deadlines[id] = self._clock() + ttl  # the timer finds out when it fires

    def check(self, id: str) -> None:
        """Raises `ConflictError` if the lease has ended, or is about to be."""
        deadline = self._deadlines.get(id)
        if deadline is None or deadline <= self._clock():
            raise ConflictError(
                f"lease {id} has ended", action="take a new one, and write again", lease=id
            )

    async def end(self, id: str) -> None:
        """Ends it now."""
        self._deadlines.pop(id, None)
        await self._submit(id)

    def expire(self) -> list[asyncio.Future[int]]:
        """Begins to end all that are overdue."""
        now = self._clock()
        overdue = [id for id, deadline in self._deadlines.items() if deadline <= now]
        for id in overdue:
            del self._deadlines[id]
        return [self._submit(id) for id in overdue]

    def close(self) -> None:
        """Stops watching the time."""
        self._closed = True
        for timer in (self._timer, *self._retries):
            if timer is not None:
                timer.cancel()
        self._deadlines.clear()

    def _submit(self, id: str) -> asyncio.Future[int]:
        future = self._end(id)
        future.add_done_callback(functools.partial(self._ended, id))
        return future

    def _ended(self, id: str, done: asyncio.Future[int]) -> None:
        if not done.cancelled() and done.exception() is not None and not self._closed:
            # It is over, but what hangs on it is still there.
            self._retries = [timer for timer in self._retries if timer.when() > self._loop.time()]
            self._retries.append(self._loop.call_later(RETRY, self._submit, id))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._deadlines:
            delay = min(self._deadlines.values()) - self._clock()
            self._timer = self._loop.call_later(min(max(delay, 0.0), LOOK), self._fire)

    def _fire(self) -> None:
        self.expire()
        self._arm()


class SQLiteLease:
    """See `Lease`."""

    def __init__(self, leases: Leases, id: str, ttl: float) -> None:
        self._leases = leases
        self.id = id
        self.ttl = ttl

    async def keep(self) -> None:
        """See `Lease.keep`."""
        self._leases.keep(self.id, self.ttl)

    async def end(self) -> None:
        """See `Lease.end`."""
        await self._leases.end(self.id)


def check_ttl(ttl: float) -> float:
    """Returns a valid time to live (seconds) unchanged.

    Raises:
        InvalidError: not a positive number.
    """
    if not (math.isfinite(ttl) and ttl > 0):
        raise InvalidError(f"{ttl} seconds are no time to live")
    return ttl


def new_lease_id() -> str:
    """A fresh identifier, never given twice."""
    return f"lease-{secrets.token_hex(10)}"
