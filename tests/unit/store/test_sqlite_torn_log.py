"""Power loss: of the write-ahead log, what was not yet on disk is missing, or is garbage.

Whatever is left of it, the store opens, and holds the first transactions, as many as there are,
each of them whole.
"""

import random
import shutil
from pathlib import Path

import pytest

from tests.unit.store.contract_watch import take
from tests.unit.store.records import event, vm
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.store.interface import Claim, Put, Transaction
from undercroft.store.sqlite import SQLiteStore

COUNT = 12


async def test_written_durably(tmp_path: Path):
    """FULL: the log is fsynced before a transaction is acknowledged (sqlite.org/pragma.html)."""
    store = await SQLiteStore.open(tmp_path / "store.db")
    assert store._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert store._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    await store.close()


@pytest.fixture
async def crashed(tmp_path: Path) -> Path:
    """A store's files as they were when the power went, all in the log."""
    store = await SQLiteStore.open(tmp_path / "store.db")
    for n in range(COUNT):
        await store.transact(
            Transaction(
                puts=[
                    Put(vm(f"v{n}", id=f"vm-{n:02}")),
                    Put(event("x" * 700 * n, id=f"ev-{n:02}")),
                ],
                claims=[Claim("vm/default", f"v{n}", f"vm-{n:02}")],
            )
        )
    directory = tmp_path / "crashed"
    directory.mkdir()
    for name in ("store.db", "store.db-wal"):
        shutil.copy(tmp_path / name, directory / name)
    await store.close()
    return directory


def end_of(log: bytes) -> int:
    """Where the zeros begin that hold the place of what is to come."""
    return len(log.rstrip(b"\x00"))


async def found(directory: Path) -> int:
    """How many transactions are left, having checked that each is whole."""
    store = await SQLiteStore.open(directory / "store.db")
    last = await store.revision()
    vms, events = await store.list(VM), await store.list(Event)
    assert [item.record.meta.id for item in vms.items] == [f"vm-{n:02}" for n in range(last)]
    assert [len(item.record.message) for item in events.items] == [700 * n for n in range(last)]
    assert [item.revision for item in vms.items] == list(range(1, last + 1))
    for n in range(COUNT):
        holder = await store.resolve("vm/default", f"v{n}")
        assert holder == (f"vm-{n:02}" if n < last else None)
    assert len(await take(store.watch([VM, Event], 0), last)) == last
    assert await store.transact(Transaction(puts=[Put(vm())])) == last + 1
    await store.close()
    return last


@pytest.mark.parametrize("how", ["cut off", "zeros", "garbage", "one byte"])
async def test_a_torn_log(crashed: Path, tmp_path: Path, how: str):
    log = (crashed / "store.db-wal").read_bytes()
    end = end_of(log)
    chance = random.Random(how)
    counts = set()
    for attempt in range(15):
        at = end if attempt == 0 else chance.randrange(1, end)
        directory = tmp_path / f"{attempt}"
        directory.mkdir()
        shutil.copy(crashed / "store.db", directory / "store.db")
        if how == "cut off":
            torn = log[:at]
        elif how == "zeros":
            torn = log[:at].ljust(len(log), b"\x00")
        elif how == "garbage":
            torn = log[:at] + chance.randbytes(end - at) + log[end:]
        else:
            torn = log[:at] + bytes([log[at] ^ 0x40]) + log[at + 1 :]
        (directory / "store.db-wal").write_bytes(torn)
        counts.add(await found(directory))
        shutil.rmtree(directory)
    assert len(counts) > 3  # it was really torn at different places
    if how != "one byte":
        assert COUNT in counts
