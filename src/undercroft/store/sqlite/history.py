"""Watches: history first, then what happens, without a gap and without a buffer per reader.

The last transactions are kept in memory, once for all readers. A reader is no more than a revision
up to which it has seen everything. If that is in memory, or at the end, it goes on from there;
otherwise it reads on from the file. So a slow reader costs nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Self

from undercroft.model.base import Record
from undercroft.store.interface import Change, Changes
from undercroft.store.sqlite.codec import Codec
from undercroft.store.sqlite.reader import Reader

IN_MEMORY = 256  # transactions


class History:
    """What the readers share. Belongs to the event loop."""

    def __init__(self, reader: Reader, codec: Codec, size: int = IN_MEMORY) -> None:
        self._reader = reader
        self._codec = codec
        self._size = size
        self._recent: deque[Changes] = deque()  # consecutive revisions
        self._waiting: set[SQLiteWatch] = set()
        self.closed = False

    def publish(self, news: Sequence[Changes], compacted: int) -> None:
        """Takes in transactions that were committed, and wakes the readers they concern."""
        for changes in news:
            if self._recent and self._recent[-1].revision + 1 != changes.revision:
                self._recent.clear()  # another process wrote: readers go to the file
            self._recent.append(changes)
        while self._recent and (
            len(self._recent) > self._size or self._recent[0].revision <= compacted
        ):
            self._recent.popleft()
        if not news or not self._waiting:
            return
        kinds = {change.kind.kind for changes in news for change in changes.changes}
        for watch in tuple(self._waiting):
            watch.notice(kinds, news[-1].revision)

    def read(self, after: int, kinds: frozenset[str]) -> tuple[list[Changes], int]:
        """As `Reader.history`, from memory where possible."""
        recent = self._recent
        if recent and recent[0].revision - 1 <= after <= recent[-1].revision:
            start = after + 1 - recent[0].revision
            selected = (_select(recent[i], kinds) for i in range(start, len(recent)))
            return [changes for changes in selected if changes is not None], recent[-1].revision
        return self._reader.history(after, kinds)

    def watch(self, kinds: Iterable[type[Record]], after: int) -> SQLiteWatch:
        """A new reader."""
        return SQLiteWatch(self, frozenset(self._codec.kind(cls) for cls in kinds), after)

    def wait(self, watch: SQLiteWatch) -> None:
        """The reader wants to hear of what comes next."""
        self._waiting.add(watch)

    def leave(self, watch: SQLiteWatch) -> None:
        """The reader does not wait any more."""
        self._waiting.discard(watch)

    def close(self) -> None:
        """Ends all watches."""
        self.closed = True
        for watch in tuple(self._waiting):
            watch.wake()


class SQLiteWatch:
    """See `Watch`."""

    def __init__(self, history: History, kinds: frozenset[str], after: int) -> None:
        self._history = history
        self._kinds = kinds
        self._seen = after  # everything up to here was delivered, or is in _ready
        self._ready: deque[Changes] = deque()
        self._wakeup: asyncio.Future[None] | None = None
        self._closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Changes:
        while not (self._closed or self._history.closed):
            if self._ready:
                return self._ready.popleft()
            found, seen = self._history.read(self._seen, self._kinds)
            if seen == self._seen:
                await self._sleep()
                continue
            # Nothing is lost if the reader is cancelled from here on: it is remembered.
            self._ready.extend(found)
            self._seen = seen
            await asyncio.sleep(0)  # a long history must not keep others from running
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """See `Watch.aclose`."""
        self._closed = True
        self.wake()

    def notice(self, kinds: set[str], revision: int) -> None:
        """Transactions up to ``revision`` changed records of these kinds, while it waited."""
        if not self._kinds.isdisjoint(kinds):
            self.wake()
        elif self._wakeup is not None and not self._wakeup.done():
            # Else it was woken, but has not looked yet at what came before.
            self._seen = max(self._seen, revision)

    def wake(self) -> None:
        """Has the reader look again."""
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    async def _sleep(self) -> None:
        self._wakeup = asyncio.get_running_loop().create_future()
        self._history.wait(self)
        try:
            await self._wakeup
        finally:
            self._history.leave(self)
            self._wakeup = None


def _select(changes: Changes, kinds: frozenset[str]) -> Changes | None:
    """The part that concerns these kinds."""
    wanted: list[Change] = [c for c in changes.changes if c.kind.kind in kinds]
    if not wanted:
        return None
    return changes if len(wanted) == len(changes.changes) else Changes(changes.revision, wanted)
