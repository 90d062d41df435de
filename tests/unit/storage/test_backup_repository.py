"""Repositories: what goes in comes out, whatever was damaged, killed or removed around it."""

import sqlite3
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from tests.unit.storage.backups import FakeDisk, backup_of
from undercroft.model.backup import CHUNK, SEGMENT, Backup
from undercroft.model.errors import (
    BusyError,
    DataCorruptError,
    DataError,
    InvalidError,
    NotFoundError,
)
from undercroft.storage.backup.packs import Packs
from undercroft.storage.backup.pruning import kept, sweep
from undercroft.storage.backup.reading import read_disk, verify
from undercroft.storage.backup.repository import Repository
from undercroft.storage.threads import Stop

SPAN = CHUNK * SEGMENT


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository.create(tmp_path / "backups", "repo-0000000000000000")


def add(repository: Repository, content: bytes, *args: object, **values: object) -> Backup:
    packs = repository.packs(write=True)
    try:
        backup = backup_of(packs, FakeDisk(content), *args, **values)  # type: ignore[arg-type]
        packs.finish()
        repository.write(backup)
        return backup
    finally:
        packs.close()


def content_of(repository: Repository, backup: Backup) -> bytes:
    packs = repository.packs()
    try:
        found = bytearray(backup.disks[0].size)
        for offset, piece in read_disk(packs.get, backup, backup.disks[0]):
            found[offset : offset + len(piece)] = piece
        return bytes(found)
    finally:
        packs.close()


def problems(repository: Repository, backup: Backup) -> list[str]:
    packs = repository.packs(fresh=True)
    try:
        return verify(packs.get, backup, Stop())
    finally:
        packs.close()


def stored(repository: Repository) -> int:
    return sum(path.stat().st_size for path in (repository.path / "packs").iterdir())


def noise(seed: int, chunks: int) -> bytes:
    return b"".join((b"%08d" % (seed * 1000 + n)) * (CHUNK // 8) for n in range(chunks))


class TestIncrements:
    @settings(max_examples=60, suppress_health_check=list(HealthCheck), deadline=None)
    @given(
        before=st.lists(st.integers(0, 3), min_size=1, max_size=12),
        after=st.lists(st.integers(0, 3), min_size=1, max_size=14),
        tail=st.integers(0, 2),
        exact=st.booleans(),
    )
    def test_each_holds_all_that_the_disk_held(
        self, tmp_path_factory, before: list[int], after: list[int], tail: int, exact: bool
    ):
        """Chunks of a few contents; the second backup knows what changed, or more than that."""
        repository = Repository.create(tmp_path_factory.mktemp("r") / "b", "repo-0")
        after = after + before[len(after) :]  # a disk never becomes smaller
        end = b"t" * (tail * 1000)
        one = b"".join(bytes([c]) * CHUNK for c in before)
        one += end if len(after) > len(before) else b""
        two = b"".join(bytes([c]) * CHUNK for c in after) + end
        two = two.ljust(len(one), b"\0")
        changed = [
            (at, min(CHUNK, len(two) - at))
            for at in range(0, len(two), CHUNK)
            if not exact or one[at : at + CHUNK] != two[at : at + CHUNK]
        ]
        first = add(repository, one)
        second = add(repository, two, first, changed)
        assert content_of(repository, first) == one
        assert content_of(repository, second) == two
        assert problems(repository, first) == problems(repository, second) == []

    def test_costs_what_changed(self, repository: Repository):
        content = bytearray(noise(1, SEGMENT + 10))
        first = add(repository, bytes(content))
        before = stored(repository)
        content[5 * CHUNK : 6 * CHUNK] = noise(9, 1)
        disk = FakeDisk(bytes(content))
        packs = repository.packs(write=True)
        second = backup_of(packs, disk, first, [(5 * CHUNK, CHUNK)])
        packs.finish()
        repository.write(second)
        packs.close()
        assert disk.asked == CHUNK
        assert stored(repository) - before < CHUNK + 40 * SEGMENT
        assert second.disks[0].maps[1] == first.disks[0].maps[1]

    def test_the_same_content_is_kept_once(self, repository: Repository):
        add(repository, noise(1, 20))
        before = stored(repository)
        add(repository, noise(1, 20), vm="vm-2")
        assert stored(repository) == before

    def test_comparing_writes_only_what_changed(self, repository: Repository):
        first = add(repository, noise(1, 20))
        before = stored(repository)
        second = add(repository, noise(1, 19) + noise(2, 1), first)  # what changed is not known
        assert stored(repository) - before < 2 * CHUNK
        assert content_of(repository, second) == noise(1, 19) + noise(2, 1)


class TestDamage:
    @pytest.fixture
    def backup(self, repository: Repository) -> Backup:
        return add(repository, noise(1, 5) + bytes(CHUNK) + b"end")

    def pack(self, repository: Repository) -> Path:
        (path,) = (repository.path / "packs").iterdir()
        return path

    def test_any_byte_of_a_pack(self, repository: Repository, backup: Backup):
        path = self.pack(repository)
        whole = path.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 97)):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
            assert problems(repository, backup), at
        path.write_bytes(whole)
        assert problems(repository, backup) == []

    def test_a_pack_that_is_cut_off_or_gone(self, repository: Repository, backup: Backup):
        path = self.pack(repository)
        path.write_bytes(path.read_bytes()[:-1])
        assert problems(repository, backup)
        path.unlink()
        assert problems(repository, backup)
        with pytest.raises(DataCorruptError, match="is not in the repository"):
            content_of(repository, backup)

    def test_what_is_left_can_be_had(self, repository: Repository, backup: Backup):
        path = self.pack(repository)
        whole = bytearray(path.read_bytes())
        whole[60] ^= 1  # in the first record
        path.write_bytes(bytes(whole))
        packs = repository.packs(fresh=True)
        found = dict(read_disk(packs.get, backup, backup.disks[0], lenient=True))
        packs.close()
        assert found[CHUNK] == noise(1, 2)[CHUNK:]
        assert 0 not in found

    def test_a_manifest(self, repository: Repository, backup: Backup):
        path = repository.path / "backups" / f"{backup.id}.json"
        path.write_bytes(path.read_bytes().replace(b"web1", b"web2"))
        assert repository.list() == ([], [backup.id])
        with pytest.raises(DataCorruptError, match="manifest"):
            repository.get(backup.id)

    def test_a_manifest_without_checksum_is_none(self, repository: Repository, backup: Backup):
        (repository.path / "backups" / f"{backup.id}.json.sha256").unlink()
        assert repository.list() == ([], [backup.id])

    def test_the_index_is_made_anew(self, repository: Repository, backup: Backup):
        index = repository.path / "index.db"
        for spoilt in (b"", b"no database at all" * 1000):
            index.write_bytes(spoilt)
            assert content_of(repository, backup) == noise(1, 5) + bytes(CHUNK) + b"end"
        index.unlink()
        assert content_of(repository, backup) == noise(1, 5) + bytes(CHUNK) + b"end"

    def test_an_index_that_knows_what_is_not_there(self, repository: Repository, backup: Backup):
        """A pack was lost: what is backed up next must not count on it."""
        self.pack(repository).unlink()
        again = add(repository, noise(1, 5))
        assert problems(repository, again) == []

    def test_nothing_is_freed_while_it_is_not_known_what_is_needed(
        self, repository: Repository, backup: Backup
    ):
        other = add(repository, noise(2, 5), vm="vm-2")
        manifest = repository.path / "backups" / f"{other.id}.json"
        manifest.write_bytes(b"{}")
        repository.remove(backup.id)
        packs = repository.packs(write=True)
        assert sweep(repository, packs, Stop()) == 0
        packs.close()


class TestCutOff:
    def test_what_was_not_finished_is_no_backup_and_is_used(self, repository: Repository):
        packs = Packs(repository.path / "packs", repository.path / "index.db", write=True)
        backup_of(packs, FakeDisk(noise(1, 50)))
        assert packs._out is not None
        packs._out.flush()
        sqlite3.Connection.close(packs._db)  # killed: neither finished nor closed
        assert repository.list() == ([], [])
        before = stored(repository)
        backup = add(repository, noise(1, 50))
        assert stored(repository) - before < 5 * CHUNK  # its maps, and what was half written
        assert problems(repository, backup) == []

    def test_a_half_manifest_is_none(self, repository: Repository):
        backup = add(repository, noise(1, 1))
        path = repository.path / "backups" / f"{backup.id}.json"
        path.rename(path.with_name(path.name + ".part"))
        assert repository.list() == ([], [])


class TestRemoving:
    def test_others_stay_whole_and_room_is_freed(self, repository: Repository):
        contents = [noise(n, 30) + noise(99, 3) for n in range(4)]
        backups = [add(repository, c, created=n) for n, c in enumerate(contents)]
        before = stored(repository)
        for gone in (0, 2):
            repository.remove(backups[gone].id)
        packs = repository.packs(write=True)
        freed = sweep(repository, packs, Stop())
        packs.close()
        assert before - stored(repository) == freed > 0
        assert len(repository.list()[0]) == 2
        for n in (1, 3):
            assert problems(repository, backups[n]) == []
            assert content_of(repository, backups[n]) == contents[n]

    @given(
        days=st.lists(st.integers(0, 400), max_size=30),
        last=st.integers(0, 5),
        daily=st.integers(0, 9),
        weekly=st.integers(0, 5),
        monthly=st.integers(0, 5),
    )
    def test_what_stays(self, days, last, daily, weekly, monthly):
        backups = [
            Backup(id=f"bk-{n:02}", vm="vm-1", name="a", created=1.7e9 + day * 86400.0)
            for n, day in enumerate(sorted(days))
        ]
        stay = kept(backups, last=last, daily=daily, weekly=weekly, monthly=monthly)
        assert {b.id for b in backups[len(backups) - last :]} <= stay
        assert len(stay) <= last + daily + weekly + monthly
        if backups and (last or daily or weekly or monthly):
            assert backups[-1].id in stay
        by_day = {int(b.created // 86400) for b in backups if b.id in stay}
        assert len(by_day) >= min(daily, len(set(days)))


class TestPlaces:
    def test_only_empty_directories_become_one(self, tmp_path: Path):
        (tmp_path / "holiday.jpg").write_bytes(b"x")
        with pytest.raises(InvalidError, match="is not empty"):
            Repository.create(tmp_path, "repo-0")
        with pytest.raises(NotFoundError, match="there are no backups"):
            Repository.open(tmp_path)
        with pytest.raises(DataError, match="no repository can be made"):
            Repository.create(tmp_path / "a" / "b", "repo-0")

    def test_a_file_is_none(self, tmp_path: Path):
        file = tmp_path / "web1.backup"
        file.write_bytes(b"x")
        with pytest.raises(InvalidError, match="is a file"):
            Repository.create(file, "repo-0")
        with pytest.raises(NotFoundError, match="is a file") as raised:
            Repository.open(file)
        assert f"croft backup restore - < {file}" in (raised.value.action or "")

    def test_one_that_is_there_is_taken(self, repository: Repository):
        assert Repository.create(repository.path, "repo-1").id == "repo-0000000000000000"

    def test_newer_ones_are_left_alone(self, repository: Repository):
        about = repository.path / "undercroft-backup.json"
        about.write_text(about.read_text().replace('"version": 1', '"version": 2'))
        with pytest.raises(DataError, match="newer"):
            Repository.open(repository.path)

    def test_one_at_a_time_writes(self, repository: Repository):
        with repository.locked(), pytest.raises(BusyError), repository.locked(share=True):
            pass
        with repository.locked(share=True), repository.locked(share=True):
            pass

    def test_references(self, repository: Repository):
        first = add(repository, b"1", created=1.0)
        second = add(repository, b"2", created=2.0)
        assert repository.get("web1").id == repository.get("vm-1").id == second.id
        assert repository.get(first.id).id == first.id
        with pytest.raises(NotFoundError):
            repository.get("bk-0000000000000000")


def test_a_full_backup_does_not_rely_on_what_is_damaged(repository: Repository):
    content = bytes(range(256)) * 256
    first = add(repository, content)
    (pack,) = (repository.path / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[60] ^= 1  # in the content of the first record
    pack.write_bytes(data)
    packs = repository.packs(write=True)
    packs.careful = True
    try:
        with pytest.raises(DataCorruptError, match="damaged"):
            backup_of(packs, FakeDisk(content), first)
    finally:
        packs.close()
