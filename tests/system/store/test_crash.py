"""kill -9 at any moment: what was acknowledged is there, and what is there is whole."""

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.system.store.crash_child import TOTAL, UPGRADE
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.store.sqlite import SQLiteStore
from undercroft.store.sqlite.migrations import MIGRATIONS

ROOT = Path(__file__).parents[3]
ROUNDS = 30


class Child:
    """A writer, killed when the block ends."""

    def __init__(self, path: Path, seed: int, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.system.store.crash_child", path, str(seed), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
            stdout=subprocess.PIPE,
        )
        self.acknowledged: list[dict[str, Any]] = []
        self.ready = False

    def __enter__(self) -> "Child":
        self.line()  # "open"
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.send_signal(signal.SIGKILL)
        while self.line():
            pass
        assert self.process.wait() == -signal.SIGKILL
        assert self.process.stdout is not None
        self.process.stdout.close()

    def line(self) -> bool:
        """Takes in one line; whether there was one. What was cut off was not acknowledged."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line.endswith(b"\n"):
            return False
        if line == b"ready\n":
            self.ready = True
        elif line != b"open\n":
            self.acknowledged.append(json.loads(line))
        return True


async def check(store: SQLiteStore) -> None:
    """What always holds."""
    volumes = (await store.list(Volume)).items
    if volumes:
        assert sum(item.record.spec.size for item in volumes) == TOTAL
    vms = (await store.list(VM)).items
    events = (await store.list(Event)).items
    assert {"ev" + i.record.meta.id[2:] for i in vms} == {i.record.meta.id for i in events}
    for item in vms:
        assert await store.resolve("vm/default", item.record.meta.name) == item.record.meta.id
    ((claims,),) = sql(store.path, "SELECT count(*) FROM claim")
    assert claims == len(vms)


async def check_history(store: SQLiteStore, acknowledged: list[dict[str, Any]]) -> None:
    """Every acknowledged transaction happened at its revision, and history leads to the present."""
    ((compacted,),) = sql(store.path, "SELECT compacted FROM state")
    last = await store.revision()
    happened: dict[int, dict[str, Any]] = {}
    state: dict[str, Any] = {}
    watch = store.watch([VM, Volume, Event], compacted)
    ((expected,),) = sql(store.path, "SELECT count(DISTINCT revision) FROM change")
    for _ in range(expected):
        changes = await anext(watch)
        happened[changes.revision] = {change.id: change.record for change in changes.changes}
        state.update(happened[changes.revision])
    await watch.aclose()
    for kind in (VM, Volume, Event):
        for item in (await store.list(kind)).items:
            id = item.record.meta.id
            assert item.revision <= compacted or state[id] == item.record
    for told in acknowledged:
        assert told["revision"] <= last
        if told["revision"] <= compacted:
            continue
        written = happened[told["revision"]]
        if "sizes" in told:
            assert {id: record.spec.size for id, record in written.items()} == told["sizes"]
        elif "created" in told:
            assert written[told["created"]].meta.name == told["name"]
            assert len(written) == 2
        else:
            assert written[told["removed"]] is None


def sql(path: Path, statement: str) -> list[Any]:
    """Looks at the file past the store."""
    with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
        return db.execute(statement).fetchall()


async def test_killed_while_writing(tmp_path: Path):
    path = tmp_path / "store.db"
    chance = random.Random(7)
    acknowledged: list[dict[str, Any]] = []
    before = 0
    for round in range(ROUNDS):
        with Child(path, round) as child:
            for _ in range(chance.choice([0, 1, 2, 10, 60, 150])):
                child.line()
            time.sleep(chance.random() * 0.01)
        acknowledged += child.acknowledged
        if round % 3 == 0:
            continue  # the next child finds things as this one left them
        assert sql(path, "PRAGMA integrity_check") == [("ok",)]
        store = await SQLiteStore.open(path)
        last = await store.revision()
        assert last >= before
        before = last
        await check(store)
        if round % 5 == 4:
            await check_history(store, acknowledged)
        await store.close()
    store = await SQLiteStore.open(path)
    await check(store)
    await check_history(store, acknowledged)
    await store.close()
    assert len(acknowledged) > ROUNDS * 5


class Moment:
    """When to kill, in seconds: early and late, mostly around the end of what is to be hit."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._span = 0.05

    def wait(self) -> None:
        """Until it has come."""
        time.sleep(self._chance.random() * self._span)

    def learn(self, late: bool) -> None:
        """Whether it was over already."""
        self._span = min(max(self._span * (0.7 if late else 1.3), 0.002), 2.0)


async def test_killed_while_being_created(tmp_path: Path):
    moment = Moment(1)
    hits = 0
    for round in range(60):
        path = tmp_path / f"{round}.db"
        with Child(path, round) as child:
            moment.wait()
        moment.learn(child.ready)
        hits += path.exists() and not child.ready
        store = await SQLiteStore.open(path)
        assert await store.revision() in (0, 1) or child.ready
        await check(store)
        await check_history(store, child.acknowledged)
        await store.close()
        if hits == 10:
            break
    assert hits, "never killed in the middle"


async def test_killed_while_migrating(tmp_path: Path):
    path = tmp_path / "store.db"
    with Child(path, 0) as child:
        for _ in range(200):
            child.line()
    store = await SQLiteStore.open(path)
    specs = {item.record.meta.id: item.record.spec for item in (await store.list(VM)).items}
    assert specs
    await store.close()
    original = path.read_bytes()
    moment = Moment(2)
    versions: list[int] = []
    for round in range(60):
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        path.write_bytes(original)
        with Child(path, 1, "upgrade") as child:
            moment.wait()
        moment.learn(child.ready)
        ((version,),) = sql(path, "PRAGMA user_version")
        versions.append(version)
        if version > len(MIGRATIONS):
            backup = tmp_path / f"store.db.bak-{len(MIGRATIONS)}"
            assert sql(backup, "PRAGMA integrity_check") == [("ok",)]
            assert sql(backup, "PRAGMA user_version") == [(len(MIGRATIONS),)]
        store = await SQLiteStore.open(path, migrations=UPGRADE)
        found = {item.record.meta.id: item.record for item in (await store.list(VM)).items}
        for id, spec in specs.items():
            assert found[id].spec == spec
            assert found[id].meta.labels["moved"] == "19"
        await check(store)
        await store.close()
        if round >= 10 and len(set(versions)) > 1:
            break
    assert len(set(versions)) > 1, "never killed in the middle"
