"""Taking what a backup has out of a repository, and verifying it. All functions here block."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from undercroft.model.backup import CHUNK, SEGMENT, Backup, BackupDisk
from undercroft.model.errors import DataCorruptError
from undercroft.storage.backup.maps import chunk_length, walk
from undercroft.storage.backup.records import ZERO_HASH
from undercroft.storage.threads import Stop

Get = Callable[[bytes], bytes]


def damaged(backup: Backup, what: str, error: DataCorruptError | None = None) -> DataCorruptError:
    """The error for a backup of which something is damaged."""
    why = f": {error.message}" if error is not None else ""
    return DataCorruptError(
        f"backup {backup.id} is damaged: {what}{why}",
        object=f"backup {backup.id}",
        action="restore another one, or what is left of this one with --damaged",
    )


def read_disk(
    get: Get, backup: Backup, disk: BackupDisk, *, lenient: bool = False
) -> Iterator[tuple[int, bytes]]:
    """All of a disk but zeroes, as (offset, content), ascending. ``lenient``: without what is
    damaged.

    Raises:
        DataCorruptError: something is damaged.
    """
    for segment, digests in walk(get, disk):
        if isinstance(digests, DataCorruptError):
            if lenient:
                continue
            raise damaged(backup, "a map", digests)
        for at, digest in enumerate(digests):
            if digest == ZERO_HASH:
                continue
            index = segment * SEGMENT + at
            try:
                content = get(digest)
                if len(content) != chunk_length(disk.size, index):
                    raise DataCorruptError("a chunk is too short or too long")
            except DataCorruptError as error:
                if lenient:
                    continue
                raise damaged(backup, f"its content at {index * CHUNK}", error) from error
            yield index * CHUNK, content


def verify(
    get: Get, backup: Backup, stop: Stop, report: Callable[[float], None] = lambda done: None
) -> list[str]:
    """What is wrong with a backup, in words; empty: every byte of it is as it was."""
    found: list[str] = []
    seen: set[bytes] = set()
    total = max(1, sum(len(disk.maps) for disk in backup.disks))
    done = 0

    def check(digest: bytes, length: int, what: str) -> None:
        stop.check()
        if digest in seen:
            return
        try:
            if len(get(digest)) != length:
                raise DataCorruptError("it is too short or too long")
        except DataCorruptError as error:
            found.append(f"{what}: {error.message}")
        else:
            seen.add(digest)

    for number, disk in enumerate(backup.disks):
        for segment, digests in walk(get, disk):
            done += 1
            report(done / total)
            if isinstance(digests, DataCorruptError):
                found.append(f"disk {number}, map {segment}: {digests.message}")
                continue
            for at, digest in enumerate(digests):
                if digest != ZERO_HASH:
                    index = segment * SEGMENT + at
                    what = f"disk {number} at {index * CHUNK}"
                    check(digest, chunk_length(disk.size, index), what)
    for file in backup.files:
        for at, text in enumerate(file.chunks):
            length = min(CHUNK, file.size - at * CHUNK)
            check(bytes.fromhex(text), length, f"file {file.name}")
    return found


def restore_files(get: Get, backup: Backup, directory: Path, *, lenient: bool = False) -> None:
    """Puts the files of a backup into a directory.

    Raises:
        DataCorruptError: one is damaged. OSError: they cannot be written.
    """
    for file in backup.files:
        parts = Path(file.name).parts
        if len(parts) > 2 or ".." in parts or Path(file.name).is_absolute():
            raise damaged(backup, f"the name of a file is {file.name[:80]!r}")
        try:
            content = b"".join(get(bytes.fromhex(text)) for text in file.chunks)
            if len(content) != file.size:
                raise DataCorruptError("it is too short or too long")
        except DataCorruptError as error:
            if lenient:
                continue
            raise damaged(backup, f"its file {file.name}", error) from error
        target = directory / file.name
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        mode = file.mode & 0o700
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with open(descriptor, "wb") as out:
            out.write(content)
            out.flush()
            os.fsync(descriptor)
