"""Listings kept in memory never differ from the file."""

from pathlib import Path

import pytest

from tests.unit.store.records import event, vm
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.store.interface import Delete, Put, Transaction
from undercroft.store.sqlite import SQLiteStore, tables


@pytest.fixture
async def store(tmp_path: Path):
    store = await SQLiteStore.open(tmp_path / "store.db")
    yield store
    await store.close()


async def same(store: SQLiteStore) -> None:
    """What is listed is what is in the file."""
    for kind in (VM, Event):
        assert await store.list(kind) == store._reader.all(kind)


async def test_it_follows(store: SQLiteStore):
    await same(store)
    one = vm(id="vm-b")
    for transaction in (
        Transaction(puts=[Put(one), Put(event("x"))]),
        Transaction(puts=[Put(vm(id="vm-a"))]),
        Transaction(puts=[Put(vm(id="vm-b", cpus=2)), Put(vm(id="vm-c"))]),
        Transaction(deletes=[Delete(VM, "vm-b")]),
        Transaction(),
        Transaction(puts=[Put(one)], deletes=[Delete(VM, "vm-a")]),
    ):
        await store.transact(transaction)
        await same(store)


async def test_it_is_not_read_again(store: SQLiteStore, monkeypatch):
    for n in range(5):
        await store.transact(Transaction(puts=[Put(vm(id=f"vm-{n}"))]))
    before = await store.list(VM)
    monkeypatch.setattr(store._reader, "all", None)
    await store.transact(Transaction(deletes=[Delete(VM, "vm-3")]))
    after = await store.list(VM)
    assert [item.record.meta.id for item in after.items] == ["vm-0", "vm-1", "vm-2", "vm-4"]
    assert all(a is b for a, b in zip(after.items[:3], before.items[:3], strict=True))


async def test_what_is_committed_but_not_published_yet(store: SQLiteStore, monkeypatch):
    await store.transact(Transaction(puts=[Put(vm(id="vm-0"))]))
    await same(store)
    # Publishing takes a turn of the loop, which may run others before.
    monkeypatch.setattr(store._history, "publish", lambda news, compacted: None)
    await store.transact(Transaction(puts=[Put(vm(id="vm-1"))]))
    await same(store)


async def test_the_list_is_the_callers(store: SQLiteStore):
    await store.transact(Transaction(puts=[Put(vm())]))
    for _ in range(3):
        listing = await store.list(VM)
        assert len(listing.items) == 1
        listing.items.clear()


@pytest.mark.parametrize("count", [2, 5])
async def test_after_much_has_happened(store: SQLiteStore, monkeypatch, count: int):
    """More than is caught up with, and less."""
    monkeypatch.setattr(tables, "FAR", 3)
    before = await store.list(VM)
    for _ in range(count):
        await store.transact(Transaction(puts=[Put(vm())]))
    if count <= 3:
        monkeypatch.setattr(store._reader, "all", None)
    else:
        monkeypatch.setattr(store._history, "read", None)
    after = await store.list(VM)
    assert len(after.items) == count
    assert after.revision == before.revision + count


async def test_after_history_was_forgotten(store: SQLiteStore):
    await same(store)
    for _ in range(5):
        await store.transact(Transaction(puts=[Put(vm())]))
    await store.compact(1)
    await same(store)


async def test_too_many_are_not_kept(store: SQLiteStore, monkeypatch):
    monkeypatch.setattr(tables, "MOST", 3)
    for count in range(1, 7):
        await store.transact(Transaction(puts=[Put(vm(id=f"vm-{count}"))]))
        await same(store)
        assert ("vm" in store._tables._tables) == (count <= 3)
    for count in range(1, 5):
        await store.transact(Transaction(deletes=[Delete(VM, f"vm-{count}")]))
    await same(store)
    assert "vm" in store._tables._tables
