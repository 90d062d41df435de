"""What the store costs, next to the same SQL by hand: ``python bench/store.py [--json]``.

The peer is Python's sqlite3 module with the same file format, the same pragmas and statements, and
one commit for each transaction, called directly; it decodes into the same records. Both alternate
within one run, and medians are compared.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))

from undercroft.model.base import Meta
from undercroft.model.names import new_id, new_mac
from undercroft.model.vm import VM, Disk, Guest, Instance, Port, VMSpec, VMState, VMStatus
from undercroft.store.interface import Check, Put, Transaction
from undercroft.store.sqlite import SQLiteStore

VMS = 1000
ROUNDS = 7


def vm(number: int) -> VM:
    """A running VM as it is in production: about 1 kB of JSON."""
    return VM(
        meta=Meta(id=new_id("vm"), name=f"vm{number}", created=time.time()),
        spec=VMSpec(
            host=new_id("host"),
            disks=(Disk(volume=new_id("volume")),),
            ports=(Port(mac=new_mac()),),
            guest=Guest(hostname=f"vm{number}", ssh_keys=("ssh-ed25519 " + "A" * 68,)),
        ),
        status=VMStatus(
            state=VMState.RUNNING,
            instance=Instance(
                pid=1000 + number,
                start_ticks=12345,
                host_boot="0" * 36,
                uid=100000,
                started=time.time(),
                accelerator="tcg",
                qemu="10.0.2",
                cpus=1,
                memory=512 << 20,
                generation=1,
            ),
        ),
    )


class ByHand:
    """The peer."""

    def __init__(self, path: Path) -> None:
        self.db = sqlite3.connect(path, isolation_level=None)
        self.db.execute("PRAGMA synchronous = FULL")
        self.reader = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, isolation_level=None)
        self.encoder = msgspec.json.Encoder()
        self.decoder = msgspec.json.Decoder(VM)

    async def get(self, id: str) -> VM:
        """One record."""
        (text, _) = self.reader.execute(
            "SELECT value, revision FROM record WHERE kind = ? AND id = ?", ("vm", id)
        ).fetchone()
        return self.decoder.decode(text)

    async def list(self) -> list[VM]:
        """All records."""
        rows = self.reader.execute(
            "SELECT id, revision, value FROM record WHERE kind = ? ORDER BY id", ("vm",)
        ).fetchall()
        return [self.decoder.decode(text) for _, _, text in rows]

    async def put(self, record: VM) -> None:
        """One transaction."""
        db, id, text = self.db, record.meta.id, self.encoder.encode(record).decode()
        db.execute("BEGIN IMMEDIATE")
        (last,) = db.execute("SELECT revision FROM state").fetchone()
        db.execute("SELECT revision FROM record WHERE kind = ? AND id = ?", ("vm", id)).fetchone()
        db.execute(
            "INSERT INTO record (kind, id, revision, value) VALUES ('vm', ?, ?, ?) "
            "ON CONFLICT (kind, id) DO UPDATE SET revision = excluded.revision, "
            "value = excluded.value",
            (id, last + 1, text),
        )
        db.execute(
            "INSERT INTO change VALUES (?, 0, 'vm', ?, ?, ?)", (last + 1, id, len(text), text)
        )
        db.execute("UPDATE state SET revision = ?, logged = logged + ?", (last + 1, len(text)))
        db.execute("COMMIT")

    def close(self) -> None:
        """Ends it."""
        self.reader.close()
        self.db.close()


async def per_call(work: Callable[[], Awaitable[object]], count: int) -> float:
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(count):
        await work()
    return (time.perf_counter() - begin) / count


async def watch_latency(store: SQLiteStore, record: VM) -> float:
    """Seconds from the moment a writer knows of its transaction until a watcher does."""
    async with contextlib.aclosing(store.watch([VM], await store.revision())) as watch:

        async def reader() -> float:
            await anext(watch)
            return time.perf_counter()

        task = asyncio.create_task(reader())
        await asyncio.sleep(0)
        await store.transact(Transaction(puts=[Put(record)]))
        known = time.perf_counter()
        return await task - known


async def measure() -> list[dict[str, object]]:
    """All figures: seconds, for both."""
    with tempfile.TemporaryDirectory(prefix="undercroft-bench-") as directory:
        ours, theirs = Path(directory) / "store.db", Path(directory) / "hand.db"
        records = [vm(n) for n in range(VMS)]
        for path in (ours, theirs):  # the peer's file has the same content
            filled = await SQLiteStore.open(path)
            await filled.transact(Transaction(puts=[Put(record) for record in records]))
            await filled.close()
        store, hand = await SQLiteStore.open(ours), ByHand(theirs)
        one = records[500]
        try:

            async def ours_put() -> None:
                found = await store.get(VM, one.meta.id)
                assert found is not None
                await store.transact(
                    Transaction(checks=[Check(VM, one.meta.id, found.revision)], puts=[Put(one)])
                )

            async def theirs_put() -> None:
                await hand.get(one.meta.id)
                await hand.put(one)

            async def ours_many() -> None:
                await asyncio.gather(
                    *(store.transact(Transaction(puts=[Put(r)])) for r in records[:50])
                )

            async def list_anew() -> None:
                store._tables.forget()
                await store.list(VM)

            async def theirs_many() -> None:
                for record in records[:50]:
                    await hand.put(record)

            cases: list[
                tuple[str, int, Callable[[], Awaitable[object]], Callable[[], Awaitable[object]]]
            ] = [
                (
                    "get one of 1,000 VMs",
                    2000,
                    lambda: store.get(VM, one.meta.id),
                    lambda: hand.get(one.meta.id),
                ),
                ("list 1,000 VMs for the first time", 5, list_anew, hand.list),
                ("list 1,000 VMs again", 5, lambda: store.list(VM), hand.list),
                ("read and compare-and-set one VM, one after the other", 40, ours_put, theirs_put),
                ("50 transactions at once", 3, ours_many, theirs_many),
            ]
            results: list[dict[str, object]] = []
            for name, count, mine, peer in cases:
                pairs = [
                    (await per_call(mine, count), await per_call(peer, count))
                    for _ in range(ROUNDS)
                ]
                results.append(
                    {
                        "what": name,
                        "undercroft": statistics.median(pair[0] for pair in pairs),
                        "by_hand": statistics.median(pair[1] for pair in pairs),
                        "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
                    }
                )
            latencies = [await watch_latency(store, one) for _ in range(100)]
            results.append(
                {
                    "what": "watch: from the writer's return to the reader's wake-up",
                    "undercroft": statistics.median(latencies),
                    "worst": max(latencies),
                }
            )
            return results
        finally:
            hand.close()
            await store.close()


def seconds(value: object) -> str:
    """A duration for people."""
    if not isinstance(value, float):
        return "–"
    return f"{value * 1e3:.2f} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.0f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="figures in seconds, as JSON")
    results = asyncio.run(measure())
    if parser.parse_args().json:
        print(json.dumps(results, indent=2))
        return
    print("| store | Undercroft | sqlite3 by hand | ratio |")
    print("| --- | --- | --- | --- |")
    for row in results:
        ratio = row.get("ratio")
        print(
            f"| {row['what']} | {seconds(row['undercroft'])} | {seconds(row.get('by_hand'))} | "
            f"{f'{ratio:.2f}' if isinstance(ratio, float) else '–'} |"
        )


if __name__ == "__main__":
    main()
