"""A full disk, bounded history, space given back, and time as it really passes."""

import asyncio
import contextlib
import math
import sqlite3
import time
from pathlib import Path

import pytest

from tests.unit.store.contract_watch import take
from tests.unit.store.records import event, vm
from undercroft.model.errors import (
    AlreadyExistsError,
    CompactedError,
    ConflictError,
    NoSpaceError,
    UnavailableError,
    UndercroftError,
)
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.store.interface import Claim, Delete, Put, Transaction
from undercroft.store.sqlite import SQLiteStore
from undercroft.store.sqlite.failures import from_sqlite
from undercroft.store.sqlite.writer import Retention

BIG = "x" * 100_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def limit(store: SQLiteStore, pages: int) -> None:
    """Lets the database grow to so many pages: SQLite then acts as on a full disk."""
    store._db.execute(f"PRAGMA max_page_count = {pages}").fetchall()


def used(store: SQLiteStore) -> int:
    """Pages of the database."""
    pages: int = store._reader._db.execute("PRAGMA page_count").fetchone()[0]
    return pages


async def until(condition) -> None:
    """Waits for something that happens by itself."""
    async with asyncio.timeout(100):
        while not condition():
            await asyncio.sleep(0.005)


async def test_full_then_room_again(path: Path):
    store = await SQLiteStore.open(path)
    kept = vm("kept")
    await store.transact(
        Transaction(puts=[Put(kept)], claims=[Claim("vm/default", "kept", kept.meta.id)])
    )
    revision = await store.revision()
    limit(store, used(store) + 2)
    with pytest.raises(NoSpaceError) as caught:
        await store.transact(
            Transaction(
                puts=[Put(event(BIG))],
                claims=[Claim("vm/default", "lost", "x")],
                deletes=[Delete(VM, kept.meta.id)],
            )
        )
    assert "room" in (caught.value.action or "")
    assert await store.revision() == revision
    assert await store.resolve("vm/default", "lost") is None
    assert (await store.list(Event)).items == []
    found = await store.get(VM, kept.meta.id)
    assert found is not None
    assert found.record == kept

    limit(store, 100_000)
    assert await store.transact(Transaction(puts=[Put(event(BIG))])) == revision + 1
    await store.close()


async def test_those_that_fit_go_through_among_those_that_do_not(path: Path):
    store = await SQLiteStore.open(path)
    await store.transact(Transaction(puts=[Put(vm("first"))]))
    limit(store, used(store) + 12)
    transactions = [
        Transaction(puts=[Put(event(BIG) if n == 1 else vm(f"v{n}"))]) for n in range(4)
    ]
    transactions.append(Transaction(claims=[Claim("s", "n", "a"), Claim("s", "n", "b")]))
    outcomes = await asyncio.gather(
        *(store.transact(t) for t in transactions), return_exceptions=True
    )
    assert outcomes[0] == 2
    assert isinstance(outcomes[1], NoSpaceError)
    assert outcomes[2:4] == [3, 4]
    assert isinstance(outcomes[4], AlreadyExistsError)
    assert len((await store.list(VM)).items) == 4
    seen = await take(store.watch([VM, Event], 0), 4)
    assert [changes.revision for changes in seen] == [1, 2, 3, 4]
    await store.close()


async def test_a_lease_that_cannot_be_ended_is_over_all_the_same(path: Path, monkeypatch):
    monkeypatch.setattr("undercroft.store.sqlite.leases.RETRY", 0.02)
    monkeypatch.setattr("undercroft.store.sqlite.database.WRITE_WAIT", 0.01)
    now = 0.0
    store = await SQLiteStore.open(path, clock=lambda: now)
    lease = await store.lease(5.0)
    await store.transact(Transaction(puts=[Put(vm(), lease.id)]))
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        now = 6.0
        with pytest.raises(UnavailableError):
            await store.expire()
        with pytest.raises(ConflictError):
            await lease.keep()
        with pytest.raises(ConflictError):
            await store.transact(Transaction(puts=[Put(vm(), lease.id)]))
        listing = await store.list(VM)
        assert len(listing.items) == 1
        other.execute("ROLLBACK")
    await take(store.watch([VM], listing.revision), 1)
    assert (await store.list(VM)).items == []
    await store.close()


async def test_a_fault_in_one_transaction_is_its_own(path: Path):
    """Numbers that SQLite cannot hold, text that is none: the store goes on."""
    store = await SQLiteStore.open(path)
    bad = Transaction(claims=[Claim("s", "\ud800", "x")])
    outcomes = await asyncio.gather(
        store.transact(bad),
        store.transact(Transaction(puts=[Put(vm())])),
        store.transact(bad),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], UndercroftError)
    assert outcomes[1] == 1
    assert isinstance(outcomes[2], UndercroftError)
    await store.close()


async def test_after_a_failed_fsync_nothing_more_is_promised(path: Path):
    """The kernel forgets what it could not write: a later fsync that succeeds means nothing."""
    store = await SQLiteStore.open(path)
    await store.transact(Transaction(puts=[Put(vm("good"))]))

    def fails(db: sqlite3.Connection, revision: int) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
        error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
        raise error

    with pytest.raises(UnavailableError):
        await store._writer.submit(fails)
    with pytest.raises(UnavailableError, match="failed to write"):
        await store.transact(Transaction(puts=[Put(vm("late"))]))
    assert len((await store.list(VM)).items) == 1
    await store.close()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_FULL, "no-space"),
        (sqlite3.SQLITE_CORRUPT, "data-corrupt"),
        (sqlite3.SQLITE_CORRUPT_INDEX, "data-corrupt"),
        (sqlite3.SQLITE_NOTADB, "data-corrupt"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "data"),
        (sqlite3.SQLITE_CANTOPEN, "data"),
        (sqlite3.SQLITE_BUSY, "unavailable"),
        (sqlite3.SQLITE_IOERR_READ, "unavailable"),
        (sqlite3.SQLITE_MISMATCH, "internal"),
    ],
)
def test_what_sqlite_means(tmp_path: Path, code: int, expected: str):
    error = sqlite3.OperationalError("it failed")
    error.sqlite_errorcode = code
    error.sqlite_errorname = "NAME"
    found = from_sqlite(error, tmp_path / "store.db")
    assert found.code == expected
    assert "store.db" in found.message
    assert found.action or expected == "internal"


async def test_locked_by_another_program(path: Path, monkeypatch):
    monkeypatch.setattr("undercroft.store.sqlite.database.WRITE_WAIT", 0.05)
    store = await SQLiteStore.open(path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(UnavailableError, match="locked"):
            await store.transact(Transaction(puts=[Put(vm())]))
        assert await store.revision() == 0
        other.execute("ROLLBACK")
    await store.transact(Transaction(puts=[Put(vm())]))
    await store.close()


# History


async def test_history_is_bounded_by_revisions(path: Path):
    store = await SQLiteStore.open(path, retention=Retention(revisions=100))
    for _ in range(10):
        await asyncio.gather(
            *(
                store.transact(Transaction(puts=[Put(vm(id="vm-0000000000000000"))]))
                for _ in range(50)
            )
        )
    await store.transact(Transaction())
    await store.transact(Transaction())
    last = await store.revision()
    with pytest.raises(CompactedError) as caught:
        await take(store.watch([VM], 0), 1)
    compacted = caught.value.data["compacted"]
    assert last - 100 - 15 - 50 <= compacted <= last - 100
    assert len(await take(store.watch([VM], 400), 100)) == 100
    await store.close()


async def test_history_is_bounded_by_size(path: Path):
    store = await SQLiteStore.open(path, retention=Retention(size=1_000_000))
    for n in range(60):
        await store.transact(Transaction(puts=[Put(event(BIG, id=f"ev-{n % 3}"))]))
        size, logged = store._reader._db.execute(
            "SELECT (SELECT sum(size) FROM change), logged FROM state"
        ).fetchone()
        assert size == logged
        assert size < 1_300_000
    await store.transact(Transaction())
    last = await store.revision()
    recent = await take(store.watch([Event], last - 6), 5)
    assert [changes.revision for changes in recent] == list(range(last - 5, last))
    await store.close()


async def test_one_revision_larger_than_all_history(path: Path):
    store = await SQLiteStore.open(path, retention=Retention(size=1000))
    async with contextlib.aclosing(store.watch([Event], 0)) as watch:
        reader = asyncio.create_task(take(watch, 1))
        await asyncio.sleep(0.01)
        await store.transact(Transaction(puts=[Put(event(BIG))]))
        assert (await reader)[0].revision == 1
    await store.transact(Transaction(puts=[Put(event("small"))]))
    (found,) = await take(store.watch([Event], 1), 1)
    assert found.revision == 2
    await store.close()


async def test_compaction_counts_what_comes_with_it(path: Path):
    """A compaction and transactions in one commit: the size of history stays right."""
    store = await SQLiteStore.open(path)
    for keep in (0, 1, 3, 100):
        await asyncio.gather(
            *(store.transact(Transaction(puts=[Put(vm())])) for _ in range(5)),
            store.compact(keep),
            *(store.transact(Transaction(puts=[Put(vm())])) for _ in range(5)),
        )
        size, logged = store._reader._db.execute(
            "SELECT (SELECT coalesce(sum(size), 0) FROM change), logged FROM state"
        ).fetchone()
        assert size == logged
    await store.close()


async def test_space_is_given_back(path: Path):
    store = await SQLiteStore.open(path)
    for n in range(200):
        await store.transact(Transaction(puts=[Put(event(BIG, id=f"ev-{n}"))]))
    before = used(store)
    await store.transact(Transaction(deletes=[Delete(Event, f"ev-{n}") for n in range(200)]))
    await store.compact(0)
    await until(lambda: used(store) < before / 4)
    await store.transact(Transaction(puts=[Put(vm())]))
    await store.close()
    assert path.stat().st_size < before * 4096 / 4
    again = await SQLiteStore.open(path)
    assert len((await again.list(VM)).items) == 1
    await again.close()


# Time


async def test_real_time_passes(path: Path):
    began = math.inf  # no time passes before what is to end is written
    store = await SQLiteStore.open(path, clock=lambda: max(0.0, time.monotonic() - began))
    short, long = await store.lease(0.05), await store.lease(60.0)
    a, b = vm("a"), vm("b")
    await store.transact(Transaction(puts=[Put(a, short.id), Put(b, long.id)]))
    revision = await store.revision()
    began = time.monotonic()
    (changes,) = await take(store.watch([VM], revision), 1)
    assert [change.id for change in changes.changes] == [a.meta.id]
    assert await store.get(VM, b.meta.id) is not None
    await store.close()


async def test_late_is_late(path: Path):
    """A holder that slept cannot go on, even if nothing has been removed yet."""
    now = 0.0
    store = await SQLiteStore.open(path, clock=lambda: now)
    lease = await store.lease(60.0)
    await store.transact(Transaction(puts=[Put(vm(), lease.id)]))
    now = 60.0
    with pytest.raises(ConflictError):
        await lease.keep()
    with pytest.raises(ConflictError):
        await store.transact(Transaction(puts=[Put(vm(), lease.id)]))
    assert len((await store.list(VM)).items) == 1
    await store.expire()
    assert (await store.list(VM)).items == []
    await store.close()


async def test_written_leases_end_after_a_restart_by_themselves(path: Path):
    store = await SQLiteStore.open(path, clock=lambda: 0.0)
    lease = await store.lease(0.05)
    await store.transact(Transaction(puts=[Put(vm(), lease.id)]))
    await store.close()
    store = await SQLiteStore.open(path)
    assert len((await store.list(VM)).items) == 1
    await take(store.watch([VM], await store.revision()), 1)
    assert (await store.list(VM)).items == []
    assert store._reader._db.execute("SELECT count(*) FROM lease").fetchone() == (0,)
    await store.close()
