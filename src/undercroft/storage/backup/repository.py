"""A repository of backups: a directory that can be read without Undercroft (docs/backup.md).

A backup is there once its manifest is, which is written last. All functions here block.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from undercroft.model.backup import FORMAT, VERSION, Backup
from undercroft.model.errors import (
    BusyError,
    DataCorruptError,
    DataError,
    InvalidError,
    NotFoundError,
)
from undercroft.model.volume import MAX_VOLUME
from undercroft.storage.backup.maps import chunk_count, segment_count
from undercroft.storage.backup.packs import Packs
from undercroft.storage.backup.writing import MOST_FILE
from undercroft.storage.files import disk_full_is_clear, sync_directory
from undercroft.storage.threads import Stop

_ABOUT = "undercroft-backup.json"
_ID = re.compile(r"bk-[0-9a-z]{16}")
_NAME = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"nvram\.fd|tpm/[A-Za-z0-9._-]{1,64}")
_LAST = 1 << 36  # seconds since 1970 that no clock shows
_README = """\
These are backups of virtual machines, made by Undercroft. docs/backup.md of Undercroft
says how they are kept; in short:

backups/ID.json         a backup: what the VM was like, and for each disk the maps of its content
backups/ID.json.sha256  its checksum, for sha256sum -c
packs/*.pack            records: 52 bytes of header (kind, codec, lengths, SHA-256 of the
                        content, CRC), then the content, as it is or as a zstd frame
index.db                where each content is: can be deleted, is made anew

A map is up to 1024 checksums of 32 bytes, each of 65536 bytes of the disk; 32 zero bytes: zeroes.
"""


class Repository:
    """A repository in a directory. Made by `open`, `create` only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = ""

    @classmethod
    def open(cls, path: Path) -> Repository:
        """The repository in this directory.

        Raises:
            NotFoundError: there is none. DataError: it cannot be read, or is a newer one.
        """
        about = path / _ABOUT
        if path.is_file():
            raise NotFoundError(
                f"{path} is a file, not a directory with backups",
                object=str(path),
                action=f"if it came through a pipe: croft backup restore - < {path}",
            )
        try:
            said: dict[str, Any] = msgspec.json.decode(about.read_bytes(), type=dict)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"there are no backups in {path}",
                object=str(path),
                action="check the path; this makes one: croft backup create VM --to DIR",
            ) from None
        except (OSError, msgspec.MsgspecError) as error:
            raise DataError(f"{about} cannot be read: {error}", object=str(path)) from error
        if said.get("format") != FORMAT:
            raise DataError(f"{path} holds something else than backups", object=str(path))
        if int(said.get("version", 0)) > VERSION:
            raise DataError(
                f"the backups in {path} are of a newer Undercroft", action="use that one"
            )
        repository = cls(path)
        repository.id = str(said.get("id", ""))
        return repository

    @classmethod
    def create(cls, path: Path, id: str) -> Repository:
        """The repository in this directory, made if the directory is empty or not there.

        Raises:
            InvalidError: something else is in there. NoSpaceError, DataError: it cannot be made.
        """
        if (path / _ABOUT).exists():
            return cls.open(path)
        if path.exists() and not path.is_dir():
            raise InvalidError(
                f"{path} is a file, not a directory",
                object=str(path),
                action="name an empty directory, or one that is not there yet",
            )
        try:
            with disk_full_is_clear("a new repository", path.parent):
                path.mkdir(mode=0o700, exist_ok=True)
                known = {"packs", "backups", "lock", "README", _ABOUT + ".part"}
                if {entry.name for entry in path.iterdir()} - known - {"lost+found"}:
                    raise InvalidError(
                        f"{path} is not empty, and has no backups",
                        object=str(path),
                        action="name an empty directory, or one that is not there yet",
                    )
                for name in ("packs", "backups"):
                    (path / name).mkdir(mode=0o700, exist_ok=True)
                (path / "README").write_text(_README)
                about = {"format": FORMAT, "version": VERSION, "id": id}
                _replace(path / _ABOUT, msgspec.json.format(msgspec.json.encode(about)) + b"\n")
        except OSError as error:
            raise DataError(
                f"no repository can be made in {path}: {error.strerror or error}",
                object=str(path),
                action="make its parent directory, writable for the daemon",
            ) from error
        return cls.open(path)

    def lock(self, *, share: bool = False) -> RepositoryLock:
        """What holds it: alone, or together with other readers."""
        return RepositoryLock(self.path, share)

    @contextlib.contextmanager
    def locked(self, stop: Stop | None = None, *, share: bool = False) -> Iterator[None]:
        """Holds the repository inside the block: alone, or together with other readers.

        Raises:
            BusyError: somebody else has it, and nothing can stop the waiting.
        """
        lock = self.lock(share=share)
        try:
            while not lock.try_lock():
                if stop is None:
                    raise BusyError(
                        f"something else is being done in {self.path}",
                        object=str(self.path),
                        action="try again when that is done",
                    )
                stop.wait(0.1)
            yield
        finally:
            lock.close()

    def packs(self, *, write: bool = False, fresh: bool = False) -> Packs:
        """Its packs; close them. Only whoever holds it alone may write. ``fresh``: nothing is
        believed but the packs themselves."""
        index = None if fresh else self.path / "index.db"
        return Packs(self.path / "packs", index, write=write)

    # -- manifests --------------------------------------------------------------------------

    def list(self) -> tuple[list[Backup], list[str]]:
        """All backups, oldest first, and the ids of those whose manifest is damaged."""
        found: list[Backup] = []
        damaged: list[str] = []
        for path in sorted((self.path / "backups").glob("bk-*.json")):
            try:
                found.append(self._read(path))
            except DataCorruptError:
                damaged.append(path.stem)
        return sorted(found, key=lambda backup: (backup.created, backup.id)), damaged

    def get(self, ref: str) -> Backup:
        """The backup with this id, or the newest of the VM with this name or id.

        Raises:
            NotFoundError: there is none. DataCorruptError: its manifest is damaged.
        """
        if _ID.fullmatch(ref):
            path = self.path / "backups" / f"{ref}.json"
            if path.exists():
                return self._read(path)
        else:
            found = [b for b in self.list()[0] if ref in (b.name, b.vm)]
            if found:
                return found[-1]
        raise NotFoundError(
            f"there is no backup {ref[:80]} in {self.path}",
            object=f"backup {ref[:80]}",
            action=f"see what exists with: croft backup ls {self.path}",
        )

    def newest(self, vm: str) -> Backup | None:
        """The newest backup of a VM (id)."""
        found = [backup for backup in self.list()[0] if backup.vm == vm]
        return found[-1] if found else None

    def _read(self, path: Path) -> Backup:
        try:
            data = path.read_bytes()
            said = path.with_name(path.name + ".sha256").read_bytes()
        except OSError as error:
            raise DataCorruptError(f"{path} cannot be read: {error.strerror}") from error
        if said != _checksum_line(path.name, data):
            raise DataCorruptError(
                f"the manifest of backup {path.stem} is damaged", object=f"backup {path.stem}"
            )
        return decode_manifest(data)

    def write(self, backup: Backup) -> None:
        """Writes a backup down, whose content is there. From now on it counts.

        Raises:
            OSError: it cannot be.
        """
        path = self.path / "backups" / f"{backup.id}.json"
        data = encode_manifest(backup)
        _replace(path.with_name(path.name + ".sha256"), _checksum_line(path.name, data))
        _replace(path, data)

    def remove(self, id: str) -> None:
        """Forgets a backup; what only it needs is removed by `sweep`."""
        path = self.path / "backups" / f"{id}.json"
        path.unlink(missing_ok=True)
        path.with_name(path.name + ".sha256").unlink(missing_ok=True)
        sync_directory(path.parent)


class RepositoryLock:
    """The lock of a repository (flock(2) on a file in it): goes with its process."""

    def __init__(self, path: Path, share: bool) -> None:
        self._path = path
        self._share = share
        self._fd: int | None = None

    def try_lock(self) -> bool:
        """Whether it is held now.

        Raises:
            DataError: there can be no lock.
        """
        try:
            if self._fd is None:
                flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
                self._fd = os.open(self._path / "lock", flags, 0o600)
            how = fcntl.LOCK_SH if self._share else fcntl.LOCK_EX
            fcntl.flock(self._fd, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if self._share:  # it cannot be written to: then nobody else changes it either
                return True
            raise DataError(
                f"{self._path} cannot be locked: {error.strerror}", object=str(self._path)
            ) from error
        return True

    def close(self) -> None:
        """Lets it go."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def encode_manifest(backup: Backup) -> bytes:
    """A manifest as it is written: JSON for people, too."""
    return msgspec.json.format(msgspec.json.encode(backup), indent=1) + b"\n"


def decode_manifest(data: bytes) -> Backup:
    """A manifest as it was written. It may be a stranger's: an archive's is.

    Raises:
        DataCorruptError: it is none, or of a newer version, or could not have been written.
    """
    try:
        backup = msgspec.json.decode(data, type=Backup)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DataCorruptError(f"a manifest makes no sense: {error}") from error
    if backup.format != FORMAT or backup.version > VERSION or not _ID.fullmatch(backup.id):
        raise DataCorruptError("a manifest is none of a backup, or of a newer version")
    reason = _impossible(backup)
    if reason is not None:
        raise DataCorruptError(f"backup {backup.id} is refused: {reason}")
    return backup


def _impossible(backup: Backup) -> str | None:
    """Why a manifest is none that could have been written."""
    if not 0 <= backup.created < _LAST:
        return "it was made at no time that there is"
    for disk in backup.disks:
        if not 0 < disk.size <= MAX_VOLUME or len(disk.maps) != segment_count(disk.size):
            return f"a disk cannot have {disk.size} bytes in {len(disk.maps)} maps"
        if not all(name is None or _NAME.fullmatch(name) for name in disk.maps):
            return "what names a map is no checksum"
    names = [file.name for file in backup.files]
    if len(set(names)) != len(names):
        return "it has a file twice"
    for file in backup.files:
        # Whatever else is in a VM's directory is not a backup's to say: what it has in memory is.
        if not _FILE.fullmatch(file.name) or file.name.endswith(("/.", "/..")):
            return f"a backup has no file {file.name[:80]!r}"
        if not 0 <= file.size <= MOST_FILE or len(file.chunks) != chunk_count(file.size):
            return f"file {file.name} cannot have {file.size} bytes in {len(file.chunks)} parts"
        if not all(_NAME.fullmatch(name) for name in file.chunks):
            return "what names a part of a file is no checksum"
    return None


def _checksum_line(name: str, data: bytes) -> bytes:
    return f"{hashlib.sha256(data).hexdigest()}  {name}\n".encode()


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(path.name + ".part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)
    sync_directory(path.parent)
