"""Archives: backups that go through a pipe."""

from pathlib import Path

import msgspec
import pytest

from tests.unit.storage.backups import FakeDisk, backup_of
from undercroft.model.backup import BackupDisk, BackupFile
from undercroft.model.errors import DataCorruptError
from undercroft.storage.backup.archive import Archive, ArchiveWriter, read_manifest
from undercroft.storage.backup.reading import read_disk, verify
from undercroft.storage.threads import Stop

CHUNK = 65536


def archived(content: bytes) -> tuple[bytes, bytes]:
    """An archive of a disk, and the disk."""
    out = bytearray()
    writer = ArchiveWriter(out.extend)
    writer.finish(backup_of(writer, FakeDisk(content)))
    return bytes(out), content


DATA = b"a" * CHUNK + bytes(CHUNK) + b"b" * CHUNK + b"a" * CHUNK + b"end"


def test_an_archive_has_all_of_it(tmp_path: Path):
    data, content = archived(DATA)
    path = tmp_path / "web1.backup"
    path.write_bytes(data)
    archive = Archive.open(path, tmp_path)
    try:
        assert verify(archive.get, archive.backup, Stop()) == []
        found = bytearray(len(content))
        for offset, piece in read_disk(archive.get, archive.backup, archive.backup.disks[0]):
            found[offset : offset + len(piece)] = piece
        assert found == content
    finally:
        archive.close()
    assert list(tmp_path.iterdir()) == [path]


def test_one_that_is_cut_off_anywhere_is_none(tmp_path: Path):
    data, _ = archived(DATA)
    path = tmp_path / "web1.backup"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(DataCorruptError):
            read_manifest(path)


def test_nothing_may_follow(tmp_path: Path):
    path = tmp_path / "web1.backup"
    path.write_bytes(archived(DATA)[0] + b"x")
    with pytest.raises(DataCorruptError, match="behind its end"):
        read_manifest(path)


CHUNK_NAME = "0" * 64


def file(name: str, size: int = 1, parts: int = 1) -> dict[str, object]:
    return {"files": (BackupFile(name=name, size=size, chunks=(CHUNK_NAME,) * parts),)}


def disk(size: int, *maps: str | None) -> dict[str, object]:
    return {"disks": (BackupDisk(size=size, maps=maps),)}


@pytest.mark.parametrize(
    "values",
    [
        file("suspend.state"),  # what the guest would go on from
        file("snapshots/x"),
        file("tpm"),
        file("tpm/.."),
        file("../nvram.fd"),
        file("/etc/shadow"),
        file("nvram.fd", size=CHUNK, parts=1 << 19),  # 32 GiB of what is there once
        file("nvram.fd", size=1 << 40),
        file("nvram.fd", size=-1, parts=0),
        disk(1 << 62),
        disk(-CHUNK),
        disk(CHUNK, "z" * 64),
        disk(CHUNK, CHUNK_NAME, CHUNK_NAME),
        {"created": 1e300},
    ],
    ids=lambda values: str(values)[:50],
)
def test_a_stranger_s_manifest_is_refused(tmp_path: Path, values: dict[str, object]):
    out = bytearray()
    writer = ArchiveWriter(out.extend)
    backup = msgspec.structs.replace(backup_of(writer, FakeDisk(DATA)), **values)
    writer.finish(backup)
    path = tmp_path / "web1.backup"
    path.write_bytes(out)
    with pytest.raises(DataCorruptError, match="refused"):
        read_manifest(path)


def test_other_files_are_none(tmp_path: Path):
    path = tmp_path / "web1.backup"
    path.write_bytes(b"#!/bin/sh\n" * 100)
    with pytest.raises(DataCorruptError, match="no backup"):
        Archive.open(path, tmp_path)
