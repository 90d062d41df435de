"""Readers who are slower to wake up than others are to write."""

import asyncio
import contextlib
import time
from pathlib import Path

from tests.unit.store.contract_watch import take
from tests.unit.store.records import event, vm
from undercroft.model.base import Record
from undercroft.model.vm import VM
from undercroft.store.interface import Put, Transaction
from undercroft.store.sqlite import SQLiteStore


async def test_nothing_is_missed_between_being_woken_and_looking(tmp_path: Path) -> None:
    """Two commits are told of in one go: what the reader waits for, then what it does not."""
    store = await SQLiteStore.open(tmp_path / "store.db")
    async with contextlib.aclosing(store.watch([VM], 0)) as watch:
        waiting = asyncio.create_task(take(watch, 1))
        await asyncio.sleep(0)
        revision = await store.revision()

        def commit(record: Record) -> None:
            """Without letting the event loop go on."""
            nonlocal revision
            revision += 1
            store.transact(Transaction(puts=[Put(record)])).send(None)
            while store._reader.revision() < revision:
                time.sleep(0.001)

        wanted = vm("a")
        commit(wanted)
        commit(event("b"))
        (changes,) = await waiting
        assert [change.record for change in changes.changes] == [wanted]
    await store.close()
