"""Writes to a store as fast as it can, telling what was acknowledged, until it is killed.

Run as ``python -m tests.system.store.crash_child STORE SEED [upgrade]``. On stdout: ``open`` before
the store is opened, ``ready`` after, then one line of JSON for each acknowledged transaction.

What always holds, between any two transactions:
- the sizes of the volumes ``vol-0`` … add up to `TOTAL`;
- a VM exists if and only if it holds the name ``vm/default <name>``, and has an event of its own.
"""

import asyncio
import json
import os
import random
import sqlite3
import sys
import time
from pathlib import Path

from msgspec.structs import replace

from tests.unit.store.records import event, vm, volume
from undercroft.model.errors import StaleError
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.store.interface import Check, Claim, Delete, Put, Release, Transaction
from undercroft.store.sqlite import SQLiteStore
from undercroft.store.sqlite.migrations import MIGRATIONS

ACCOUNTS = 4
TOTAL = 1000 * ACCOUNTS
WRITERS = 4


def tell(line: str) -> None:
    """One line, at once."""
    os.write(1, line.encode() + b"\n")


def slow_step(db: sqlite3.Connection) -> None:
    """A migration long enough to be killed in."""
    for n in range(20):
        db.execute("UPDATE record SET value = json_set(value, '$.meta.labels.moved', ?)", (str(n),))
        time.sleep(0.0005)


UPGRADE = [*MIGRATIONS, slow_step, slow_step]


async def begin(store: SQLiteStore) -> None:
    """The volumes, all at once."""
    if (await store.list(Volume)).items:
        return
    records = [volume(f"v{n}", id=f"vol-{n}", size=TOTAL // ACCOUNTS) for n in range(ACCOUNTS)]
    await store.transact(
        Transaction(
            checks=[Check(Volume, record.meta.id, 0) for record in records],
            puts=[Put(record) for record in records],
        )
    )


async def move(store: SQLiteStore, chance: random.Random) -> None:
    """Moves size from one volume to another."""
    a, b = chance.sample(range(ACCOUNTS), 2)
    source, target = await store.get(Volume, f"vol-{a}"), await store.get(Volume, f"vol-{b}")
    assert source is not None
    assert target is not None
    amount = chance.randint(0, source.record.spec.size)
    less, more = source.record.spec.size - amount, target.record.spec.size + amount
    try:
        revision = await store.transact(
            Transaction(
                checks=[
                    Check(Volume, f"vol-{a}", source.revision),
                    Check(Volume, f"vol-{b}", target.revision),
                ],
                puts=[
                    Put(replace(source.record, spec=replace(source.record.spec, size=less))),
                    Put(replace(target.record, spec=replace(target.record.spec, size=more))),
                ],
            )
        )
    except StaleError:
        return
    tell(json.dumps({"revision": revision, "sizes": {f"vol-{a}": less, f"vol-{b}": more}}))


async def create(store: SQLiteStore, name: str, text: str) -> str:
    """A VM, its name and its event."""
    record = vm(name, user_data=text)
    id = record.meta.id
    revision = await store.transact(
        Transaction(
            claims=[Claim("vm/default", name, id)],
            puts=[Put(record), Put(event(text, id="ev" + id[2:]))],
        )
    )
    tell(json.dumps({"revision": revision, "created": id, "name": name}))
    return id


async def remove(store: SQLiteStore, name: str, id: str) -> None:
    """The VM, its name and its event."""
    revision = await store.transact(
        Transaction(
            checks=[],
            releases=[Release("vm/default", name, id)],
            deletes=[Delete(VM, id), Delete(Event, "ev" + id[2:])],
        )
    )
    tell(json.dumps({"revision": revision, "removed": id}))


async def write(store: SQLiteStore, n: int, seed: int) -> None:
    """One of several writers."""
    chance = random.Random(seed * 100 + n)
    mine: dict[str, str] = {}
    while True:
        what = chance.random()
        if what < 0.5:
            await move(store, chance)
        elif what < 0.8 or not mine:
            name = f"s{seed}-w{n}-{chance.randrange(1 << 40)}"
            mine[name] = await create(store, name, "x" * chance.choice([1, 500, 9000]))
        else:
            name = chance.choice(sorted(mine))
            await remove(store, name, mine.pop(name))
        if chance.random() < 0.02:
            await store.compact(chance.randrange(2000, 3000))


async def main(path: Path, seed: int, upgrade: bool) -> None:
    tell("open")
    store = await SQLiteStore.open(path, migrations=UPGRADE if upgrade else MIGRATIONS)
    await begin(store)
    tell("ready")
    await asyncio.gather(*(write(store, n, seed) for n in range(WRITERS)))


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2]), "upgrade" in sys.argv[3:]))
