"""The embedded store.

One thread writes (`writer`); reads and watches are answered on the event loop (`reader`,
`history`). Durable means: in the write-ahead log and fsynced, before ``transact`` returns.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

from undercroft.model.base import Record
from undercroft.model.errors import UnavailableError
from undercroft.store.interface import Listing, Transaction, Versioned
from undercroft.store.kinds import KINDS
from undercroft.store.sqlite.codec import Codec
from undercroft.store.sqlite.database import close_writer, open_reader, open_writer
from undercroft.store.sqlite.history import History, SQLiteWatch
from undercroft.store.sqlite.leases import Leases, SQLiteLease, check_ttl, new_lease_id
from undercroft.store.sqlite.migrations import MIGRATIONS, Migration
from undercroft.store.sqlite.reader import Reader
from undercroft.store.sqlite.statements import begin_lease, compact, end_lease, prepare
from undercroft.store.sqlite.tables import Tables
from undercroft.store.sqlite.writer import Batch, Retention, Writer

R = TypeVar("R", bound=Record)

RETENTION = Retention()


class SQLiteStore:
    """See `Store`. Made by `open`; belongs to the event loop it was opened on.

    Only one process may have it open (`DataDirectory.lock`); others may read the file.
    """

    def __init__(
        self,
        path: Path,
        codec: Codec,
        writer: sqlite3.Connection,
        reader: sqlite3.Connection,
        retention: Retention,
        clock: Callable[[], float],
    ) -> None:
        self.path = path
        self._codec = codec
        self._db = writer
        self._reader = Reader(reader, path, codec)
        self._history = History(self._reader, codec)
        self._tables = Tables(self._reader, self._history)
        self._writer = Writer(writer, path, retention, self._deliver)
        self._leases = Leases(
            clock, lambda id: self._writer.submit(end_lease(id, codec)), self._reader.leases()
        )
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        kinds: Mapping[str, type[Record]] = KINDS,
        migrations: Sequence[Migration] = MIGRATIONS,
        retention: Retention = RETENTION,
        clock: Callable[[], float] = time.monotonic,
    ) -> Self:
        """Opens the store, or creates it; brings an older one up to date, after a backup.

        ``clock`` (seconds) decides when leases end.

        Raises:
            DataNewerError: written by a newer version; it is left untouched.
            DataCorruptError: damaged, or not an Undercroft store.
            DataError: the directory is missing or not writable.
            NoSpaceError: no room to create or migrate it.
        """
        codec = Codec(path, kinds)

        def connect() -> tuple[sqlite3.Connection, sqlite3.Connection]:
            writer = open_writer(path, codec, migrations)
            try:
                return writer, open_reader(path)
            except BaseException:
                writer.close()
                raise

        writer, reader = await asyncio.to_thread(connect)
        return cls(path, codec, writer, reader, retention, clock)

    async def get(self, kind: type[R], id: str) -> Versioned[R] | None:
        """See `Store.get`."""
        self._check_open()
        return self._reader.get(kind, id)

    async def list(self, kind: type[R]) -> Listing[R]:
        """See `Store.list`."""
        self._check_open()
        return self._tables.list(kind)

    async def resolve(self, scope: str, name: str) -> str | None:
        """See `Store.resolve`."""
        self._check_open()
        return self._reader.resolve(scope, name)

    async def revision(self) -> int:
        """See `Store.revision`."""
        self._check_open()
        return self._reader.revision()

    async def transact(self, transaction: Transaction) -> int:
        """See `Store.transact`."""
        self._check_open()
        prepared = prepare(transaction, self._codec)
        for put in transaction.puts:
            if put.lease is not None:
                self._leases.check(put.lease)
        done = self._writer.submit(prepared)
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            # It is carried out all the same, and must not be after who was cancelled, or whoever
            # goes on in its place, has looked at what there is.
            await asyncio.wait({done})
            if not done.cancelled():
                done.exception()  # seen
            raise

    def watch(self, kinds: Sequence[type[Record]], from_revision: int) -> SQLiteWatch:
        """See `Store.watch`."""
        self._check_open()
        return self._history.watch(kinds, from_revision)

    async def lease(self, ttl: float) -> SQLiteLease:
        """See `Store.lease`. After a restart a lease begins its time anew (see `leases`)."""
        self._check_open()
        id = new_lease_id()
        await self._writer.submit(begin_lease(id, check_ttl(ttl)))
        return self._leases.begin(id, ttl)

    async def expire(self) -> None:
        """Ends the leases that are overdue now; happens by itself as real time passes."""
        self._check_open()
        await asyncio.gather(*self._leases.expire())

    async def compact(self, keep: int) -> None:
        """See `Store.compact`. Happens by itself too, within the `Retention`."""
        self._check_open()
        await self._writer.submit(compact(max(0, keep)))

    async def close(self) -> None:
        """See `Store.close`."""
        if self._closing is None:
            self._closing = asyncio.create_task(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self._leases.close()
        await self._writer.stop()
        self._history.close()
        # The reader first: the last connection to go folds the write-ahead log into the file.
        self._reader.close()
        await asyncio.to_thread(close_writer, self._db, self.path)

    def _deliver(self, batch: Batch) -> None:
        self._history.publish(batch.changes(), batch.compacted)
        for outcome in batch.outcomes:
            outcome.resolve()

    def _check_open(self) -> None:
        if self._closing is not None:
            raise UnavailableError("the store is closed", object=str(self.path))
