"""Opening a store file: new, old, newer, damaged, somebody else's."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from tests.unit.store.records import vm, volume
from undercroft.model.base import Model, Record, Spec
from undercroft.model.errors import (
    CompactedError,
    DataCorruptError,
    DataError,
    DataNewerError,
    UndercroftError,
)
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeSpec
from undercroft.store.interface import Claim, Put, Transaction
from undercroft.store.sqlite import SQLiteStore
from undercroft.store.sqlite.migrations import MIGRATIONS


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


async def fill(path: Path, count: int = 3) -> list[VM]:
    """Writes a store with some VMs, and closes it."""
    records = [vm(f"v{n}") for n in range(count)]
    store = await SQLiteStore.open(path)
    for record in records:
        await store.transact(
            Transaction(
                puts=[Put(record)], claims=[Claim("vm/default", record.meta.name, record.meta.id)]
            )
        )
    await store.close()
    return records


def sql(path: Path, statement: str) -> list[tuple[object, ...]]:
    """Does to the file what no Undercroft would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        return db.execute(statement).fetchall()


def version(path: Path) -> int:
    ((number,),) = sql(path, "PRAGMA user_version")
    assert isinstance(number, int)
    return number


# Files


async def test_only_the_owner_can_read_it(path: Path):
    before = os.umask(0)
    try:
        store = await SQLiteStore.open(path)
        await store.transact(Transaction(puts=[Put(vm())]))
        files = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        await store.close()
    finally:
        os.umask(before)
    assert files == dict.fromkeys(
        ["store.db", "store.db-wal", "store.db-shm", "store.db-reserve"], 0o600
    )


async def test_a_file_that_others_could_read_is_closed_to_them(path: Path):
    await fill(path)
    path.chmod(0o644)
    await (await SQLiteStore.open(path)).close()
    assert path.stat().st_mode & 0o777 == 0o600


async def test_records_can_be_read_with_any_client(path: Path):
    (record,) = await fill(path, 1)
    assert sql(path, "SELECT kind, id, value ->> '$.spec.memory' FROM record") == [
        ("vm", record.meta.id, record.spec.memory)
    ]


async def test_closed_it_is_one_file_and_its_reserve(path: Path):
    await fill(path)
    assert sorted(file.name for file in path.parent.iterdir()) == ["store.db", "store.db-reserve"]
    path.with_name("store.db-reserve").unlink()  # nothing is in it
    store = await SQLiteStore.open(path)
    assert len((await store.list(VM)).items) == 3
    await store.close()


@pytest.mark.parametrize("name", ["with space", "per%cent", "quest?ion", "ha#sh", "ü"])
async def test_any_name_of_a_directory(tmp_path: Path, name: str):
    directory = tmp_path / name
    directory.mkdir()
    (record,) = await fill(directory / "store.db", 1)
    store = await SQLiteStore.open(directory / "store.db")
    assert await store.get(VM, record.meta.id) is not None
    await store.close()


async def test_no_directory(tmp_path: Path):
    with pytest.raises(DataError, match="does not exist") as caught:
        await SQLiteStore.open(tmp_path / "missing" / "store.db")
    assert caught.value.action


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
async def test_not_an_ordinary_file(path: Path, kind: str):
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(DataCorruptError, match="not an ordinary file"):
        await SQLiteStore.open(path)


READ_ONLY = """
import asyncio, concurrent.futures.thread, os, sys
from pathlib import Path
from undercroft.model.errors import DataError
from undercroft.store.sqlite import SQLiteStore
if os.geteuid() == 0:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
try:
    asyncio.run(SQLiteStore.open(Path(sys.argv[1])))
except DataError as error:
    print(error.code, error.action)
"""


@pytest.fixture
def visible() -> Iterator[Path]:
    """A directory that other users can reach."""
    directory = Path(tempfile.mkdtemp(prefix="undercroft-store-"))
    directory.chmod(0o755)
    yield directory
    directory.chmod(0o755)
    shutil.rmtree(directory)


@pytest.mark.parametrize("existing", [False, True])
async def test_a_directory_that_cannot_be_written(visible: Path, existing: bool):
    """Root can write anywhere, so another user tries."""
    path = visible / "store.db"
    if existing:
        await fill(path)
        path.chmod(0o444)
    visible.chmod(0o555)
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(path)],
        env={"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.startswith("data "), done.stderr
    assert "owner and mode" in done.stdout


# Not ours, or damaged


@pytest.mark.parametrize("content", [b"x", b"hello" * 1000, b"\x00" * 8192, b"SQLite format 3\x00"])
async def test_not_a_database(path: Path, content: bytes):
    path.write_bytes(content)
    with pytest.raises(DataCorruptError) as caught:
        await SQLiteStore.open(path)
    assert "move store.db away" in (caught.value.action or "")
    assert path.read_bytes() == content


async def test_a_database_of_another_program(path: Path):
    sql(path, "CREATE TABLE recipes (name)")
    content = path.read_bytes()
    with pytest.raises(DataCorruptError, match="another program"):
        await SQLiteStore.open(path)
    assert path.read_bytes() == content


async def test_a_file_cut_off(path: Path):
    await fill(path, 200)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DataCorruptError):
        await SQLiteStore.open(path)


async def test_pages_of_records_overwritten(path: Path):
    await fill(path, 200)
    size = path.stat().st_size
    with path.open("r+b") as file:
        for page in range(10, size // 4096 - 5):
            file.seek(page * 4096)
            file.write(b"\xff" * 4096)
    with pytest.raises(DataCorruptError):
        await SQLiteStore.open(path)


async def test_a_crash_has_the_pages_checked(path: Path):
    """Damage in an index, which reading records does not meet."""
    await fill(path, 200)
    store = await SQLiteStore.open(path)
    await store.transact(Transaction(puts=[Put(vm())]))
    crashed = path.parent / "crashed"
    crashed.mkdir()
    for file in ("store.db", "store.db-wal"):
        shutil.copy(path.parent / file, crashed / file)
    await store.close()
    ((root,),) = sql(path, "SELECT rootpage FROM sqlite_schema WHERE tbl_name = 'claim'")
    assert isinstance(root, int)
    with (crashed / "store.db").open("r+b") as database:
        database.seek((root - 1) * 4096 + 8)
        database.write(b"\xff" * 64)
    with pytest.raises(DataCorruptError):
        await SQLiteStore.open(crashed / "store.db")


@pytest.mark.parametrize("value", ["", "{}", "null", '{"meta": 1}', "[" * 10000, "\ufffd"])
async def test_a_record_that_cannot_be_read(path: Path, value: str):
    (record,) = await fill(path, 1)
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute("UPDATE record SET value = ?", (value,))
    with pytest.raises(DataCorruptError, match=record.meta.id):
        await SQLiteStore.open(path)


# Versions


async def test_a_newer_file_is_left_alone(path: Path):
    await fill(path)
    sql(path, "PRAGMA user_version = 9")
    content = path.read_bytes()
    with pytest.raises(DataNewerError) as caught:
        await SQLiteStore.open(path)
    error = caught.value
    assert "version 9" in error.message
    assert f"version {len(MIGRATIONS)}" in error.message
    assert f"store.db.bak-{len(MIGRATIONS)}" in (error.action or "")
    assert error.data == {"found": 9, "known": len(MIGRATIONS)}
    assert path.read_bytes() == content
    assert not list(path.parent.glob("*.bak*"))


def rename_images(db: sqlite3.Connection) -> None:
    """A migration such as there may be one day."""
    db.execute("ALTER TABLE claim ADD COLUMN since REAL NOT NULL DEFAULT 0")
    db.execute("UPDATE record SET value = json_set(value, '$.meta.labels.moved', 'yes')")


async def test_an_older_file_is_brought_up_to_date(path: Path):
    records = await fill(path)
    steps = [*MIGRATIONS, rename_images, lambda db: None]
    store = await SQLiteStore.open(path, migrations=steps)
    for record in records:
        found = await store.get(VM, record.meta.id)
        assert found is not None
        assert found.record.meta.labels["moved"] == "yes"
        assert found.record.spec == record.spec
    assert await store.revision() == len(records)
    with pytest.raises(CompactedError):  # the history has records of the old shape
        await anext(store.watch([VM], 0))
    assert await store.transact(Transaction(puts=[Put(vm())])) == len(records) + 1
    await store.close()
    assert version(path) == len(MIGRATIONS) + 2

    backup = path.with_name(f"store.db.bak-{len(MIGRATIONS)}")
    assert backup.stat().st_mode & 0o777 == 0o600
    assert list(path.parent.glob("*.bak*")) == [backup]
    backup.rename(path)
    old = await SQLiteStore.open(path)
    assert sorted(i.record.meta.name for i in (await old.list(VM)).items) == ["v0", "v1", "v2"]
    assert await old.resolve("vm/default", "v1") == records[1].meta.id
    await old.close()


async def test_what_was_only_in_the_log_is_in_the_backup(path: Path):
    """After a crash the newest transactions are in the write-ahead log alone."""
    store = await SQLiteStore.open(path)
    one = vm()
    await store.transact(Transaction(puts=[Put(one)]))
    crashed = path.parent / "crashed"
    crashed.mkdir()
    for file in ("store.db", "store.db-wal"):
        shutil.copy(path.parent / file, crashed / file)
    await store.close()
    new = await SQLiteStore.open(crashed / "store.db", migrations=[*MIGRATIONS, rename_images])
    await new.close()
    (crashed / f"store.db.bak-{len(MIGRATIONS)}").rename(crashed / "store.db")
    old = await SQLiteStore.open(crashed / "store.db")
    assert await old.get(VM, one.meta.id) is not None
    await old.close()


async def test_a_migration_that_fails_changes_nothing(path: Path):
    (record,) = await fill(path, 1)

    def fails(db: sqlite3.Connection) -> None:
        rename_images(db)
        raise RuntimeError("out of luck")

    with pytest.raises(UndercroftError, match="out of luck") as caught:
        await SQLiteStore.open(path, migrations=[*MIGRATIONS, fails])
    assert "as it was" in (caught.value.action or "")
    assert version(path) == len(MIGRATIONS)
    store = await SQLiteStore.open(path)
    found = await store.get(VM, record.meta.id)
    assert found is not None
    assert found.record == record
    await store.close()


async def test_the_steps_before_a_failed_one_stay(path: Path):
    await fill(path, 1)

    def fails(db: sqlite3.Connection) -> None:
        db.execute("DROP TABLE nonsense")

    with pytest.raises(UndercroftError):
        await SQLiteStore.open(path, migrations=[*MIGRATIONS, rename_images, fails])
    assert version(path) == len(MIGRATIONS) + 1
    store = await SQLiteStore.open(path, migrations=[*MIGRATIONS, rename_images, lambda db: None])
    assert len((await store.list(VM)).items) == 1
    await store.close()


def test_every_step_has_its_place():
    """A released step is never changed: an old file would not be what the next one expects."""
    assert [step.__name__ for step in MIGRATIONS] == ["create", "layers"]


# Records of other versions


class OldSpec(Spec, frozen=True, kw_only=True):
    size: int
    host: str


class OldVolume(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "volume"
    spec: OldSpec


class NewStatus(Model, frozen=True, kw_only=True):
    state: str = "pending"
    temperature: float = 20.0


class NewSpec(OldSpec, frozen=True, kw_only=True):
    colour: str = "grey"


class NewStatusVolume(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "volume"
    spec: OldSpec
    status: NewStatus = NewStatus()


class NewSpecVolume(Record, frozen=True, kw_only=True):
    kind: ClassVar[str] = "volume"
    spec: NewSpec


async def rewrite(path: Path, old: type[Record], record: Record) -> None:
    """Writes a record as another version would."""
    store = await SQLiteStore.open(path, kinds={"volume": old})
    await store.transact(Transaction(puts=[Put(record)]))
    await store.close()


async def test_fields_added_since_take_their_defaults(path: Path):
    meta = volume().meta
    old = OldVolume(meta=meta, spec=OldSpec(size=4096, host="h"))
    await rewrite(path, OldVolume, old)
    store = await SQLiteStore.open(path)
    found = await store.get(Volume, meta.id)
    assert found is not None
    assert found.record == Volume(meta=meta, spec=VolumeSpec(size=4096, host="h"))
    await store.close()


async def test_what_a_newer_version_measured_is_ignored(path: Path):
    meta = volume().meta
    new = NewStatusVolume(meta=meta, spec=OldSpec(size=4096, host="h"))
    await rewrite(path, NewStatusVolume, new)
    store = await SQLiteStore.open(path)
    found = await store.get(Volume, meta.id)
    assert found is not None
    assert found.record.status.state == "pending"
    await store.close()


async def test_what_a_newer_version_was_asked_for_is_not_dropped(path: Path):
    meta = volume().meta
    new = NewSpecVolume(meta=meta, spec=NewSpec(size=4096, host="h", colour="red"))
    await rewrite(path, NewSpecVolume, new)
    with pytest.raises(DataNewerError, match="colour") as caught:
        await SQLiteStore.open(path)
    assert meta.id in caught.value.message


async def test_a_kind_that_only_a_newer_version_knows(path: Path):
    await fill(path)
    with pytest.raises(DataNewerError, match="'vm'"):
        await SQLiteStore.open(path, kinds={"volume": Volume})


async def test_a_kind_that_is_not_registered(path: Path):
    store = await SQLiteStore.open(path, kinds={"volume": Volume})
    with pytest.raises(UndercroftError):
        await store.transact(Transaction(puts=[Put(vm())]))
    with pytest.raises(UndercroftError):
        await store.list(VM)
    await store.close()
