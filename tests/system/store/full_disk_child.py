"""Fills the disk under a store. Run in a mount namespace of its own, with a directory to mount on.

Prints ``passed`` at the end; a failed assertion ends it before.
"""

import asyncio
import contextlib
import ctypes
import os
import sqlite3
import sys
from pathlib import Path

import pytest

from tests.unit.store.records import event, vm
from undercroft.model.errors import NoSpaceError
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.store.interface import Claim, Delete, Put, Release, Transaction
from undercroft.store.sqlite import SQLiteStore
from undercroft.store.sqlite.migrations import MIGRATIONS

SIZE = 24 << 20


def mount(directory: Path) -> None:
    """A small file system, which goes with the namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", b"/", None, 0x44000, None):  # MS_REC | MS_PRIVATE
        raise OSError(ctypes.get_errno(), "make private")
    if libc.mount(b"none", os.fsencode(directory), b"tmpfs", 0, f"size={SIZE}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def fill(directory: Path) -> Path:
    """Takes all space that is left."""
    path = directory / "filler"
    with path.open("ab") as file, contextlib.suppress(OSError):
        while True:
            os.write(file.fileno(), b"x" * 4096)
    return path


async def no_room_to_create(directory: Path) -> None:
    filler = fill(directory)
    with pytest.raises(NoSpaceError) as caught:
        await SQLiteStore.open(directory / "new.db")
    assert str(directory) in (caught.value.action or "")
    filler.unlink()
    store = await SQLiteStore.open(directory / "new.db")
    await store.transact(Transaction(puts=[Put(vm())]))
    await store.close()


async def full_while_writing(directory: Path) -> None:
    path = directory / "store.db"
    store = await SQLiteStore.open(path)
    kept: dict[str, int] = {}

    async def put(size: int) -> None:
        record = event("x" * size)
        kept[record.meta.id] = await store.transact(
            Transaction(puts=[Put(record)], claims=[Claim("event", record.meta.id, "x")])
        )

    async def check() -> None:
        listing = await store.list(Event)
        assert {i.record.meta.id: i.revision for i in listing.items} == kept
        for id in kept:
            assert await store.resolve("event", id) == "x"
        with contextlib.closing(sqlite3.connect(path)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            assert db.execute("SELECT count(*) FROM claim").fetchone() == (len(kept),)

    for _ in range(20):
        await put(1000)
    filler = fill(directory)

    # The space of the log was taken in advance: what is small goes on for a while.
    for _ in range(20):
        await put(10)
    for id in list(kept)[:5]:
        await store.transact(
            Transaction(deletes=[Delete(Event, id)], releases=[Release("event", id, "x")])
        )
        del kept[id]
    await check()

    # Until it is really over; what fails leaves nothing.
    for round in range(3):
        refused = 0
        while refused < 3:
            assert len(kept) < 5000
            outcomes = await asyncio.gather(
                *(put(20_000) for _ in range(5)), return_exceptions=True
            )
            for outcome in outcomes:
                assert outcome is None or isinstance(outcome, NoSpaceError), repr(outcome)
            refused += isinstance(outcomes[-1], NoSpaceError)
        await check()
        os.truncate(filler, filler.stat().st_size - (1 << 20))
        await put(20_000)
        await check()
        if round == 1:  # closed and opened in between
            await store.close()
            store = await SQLiteStore.open(path)
            await check()
        fill(directory)

    # A daemon can be started again, and cleanly or not, small things can be done.
    await store.close()
    store = await SQLiteStore.open(path)
    await check()
    revision = await store.revision()
    filler.unlink()
    await put(20_000)
    assert await store.revision() == revision + 1
    await check()
    await store.close()


async def full_at_any_place_of_the_log(directory: Path) -> None:
    """Small things go on for a while wherever the log is when the disk becomes full."""
    store = await SQLiteStore.open(directory / "store.db")
    for number in range(24):
        filler = fill(directory)
        for _ in range(25):
            await store.transact(Transaction(puts=[Put(event("x" * 1000))]))
        filler.unlink()
        await store.transact(Transaction(puts=[Put(event("x"))]))
        for _ in range(number):
            await store.transact(Transaction(puts=[Put(event("x" * 100))]))
    await store.close()


async def filled_while_closed(directory: Path) -> None:
    path = directory / "store.db"
    store = await SQLiteStore.open(path)
    records = [vm(f"v{n}") for n in range(30)]
    await store.transact(Transaction(puts=[Put(record) for record in records]))
    for _ in range(2):
        await store.close()
        fill(directory)
        store = await SQLiteStore.open(path)
        for _ in range(15):
            await store.transact(Transaction(deletes=[Delete(VM, records.pop().meta.id)]))
    assert (await store.list(VM)).items == []
    await store.close()


async def no_room_for_a_backup(directory: Path) -> None:
    path = directory / "old.db"
    store = await SQLiteStore.open(path)
    one = vm()
    await store.transact(Transaction(puts=[Put(one)]))
    for _ in range(40):  # 8 MB with the history: more than is held in reserve
        await store.transact(Transaction(puts=[Put(event("x" * 100_000))]))
    await store.close()
    filler = fill(directory)
    os.truncate(filler, filler.stat().st_size - (100 << 10))
    steps = [*MIGRATIONS, lambda db: None]
    with pytest.raises(NoSpaceError):
        await SQLiteStore.open(path, migrations=steps)
    assert not list(directory.glob("*.half")), "left half a backup"
    filler.unlink()
    store = await SQLiteStore.open(path)  # still the old version
    assert await store.get(VM, one.meta.id) is not None
    await store.close()
    store = await SQLiteStore.open(path, migrations=steps)
    assert await store.get(VM, one.meta.id) is not None
    await store.close()


def main(directory: Path) -> None:
    mount(directory)
    for what in (
        no_room_to_create,
        full_while_writing,
        full_at_any_place_of_the_log,
        filled_while_closed,
        no_room_for_a_backup,
    ):
        asyncio.run(what(directory))
        print(what.__name__, file=sys.stderr)
        for file in directory.iterdir():
            file.unlink()
    print("passed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
