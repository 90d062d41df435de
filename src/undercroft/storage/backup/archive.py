"""A backup as one file, for pipes: the records that it consists of, and its manifest as the last
one. It is whole if and only if that is there. All functions here block."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from undercroft.model.backup import Backup
from undercroft.model.errors import DataCorruptError
from undercroft.storage.backup.packs import Packs
from undercroft.storage.backup.records import (
    HEADER,
    MANIFEST_KIND,
    Decoder,
    Encoder,
    digest_of,
    parse,
    read_record,
)
from undercroft.storage.backup.repository import decode_manifest, encode_manifest


class ArchiveWriter:
    """Makes an archive, a piece at a time. For one thread."""

    careful = False

    def __init__(self, send: Callable[[bytes], None]) -> None:
        self._send = send
        self._seen: set[bytes] = set()
        self._encoder = Encoder()
        self.written = 0

    def has(self, digest: bytes) -> bool:
        """Whether a content was sent."""
        return digest in self._seen

    def get(self, digest: bytes) -> bytes:
        """What was sent cannot be had again.

        Raises:
            DataCorruptError: always.
        """
        raise DataCorruptError(f"{digest.hex()[:16]}… is not here any more")

    def put(self, kind: int, content: bytes | bytearray | memoryview, digest: bytes = b"") -> bytes:
        """Sends a content unless it was; what names it."""
        digest = digest or digest_of(content)
        if digest not in self._seen:
            self._seen.add(digest)
            header, body = self._encoder.encode(kind, digest, content)
            self._send(header + body)
            self.written += len(header) + len(body)
        return digest

    def finish(self, backup: Backup) -> None:
        """Sends the manifest: the archive is whole."""
        content = encode_manifest(backup)
        header, body = self._encoder.encode(MANIFEST_KIND, digest_of(content), content)
        self._send(header + body)


class Archive:
    """An archive in a file. Close it."""

    def __init__(self, path: Path, backup: Backup, tmp: Path) -> None:
        self.backup = backup
        self._directory = tempfile.TemporaryDirectory(prefix="archive-", dir=tmp)
        try:
            # An archive is a pack that happens to have a manifest.
            (Path(self._directory.name) / "archive.pack").symlink_to(path)
            self._packs = Packs(Path(self._directory.name), None)
        except BaseException:
            self._directory.cleanup()
            raise

    @classmethod
    def open(cls, path: Path, tmp: Path) -> Archive:
        """The archive in this file; ``tmp``: where what passes goes.

        Raises:
            DataCorruptError: it is none, or cut off.
        """
        with path.open("rb") as file:
            backup = _manifest(file)
        return cls(path, backup, tmp)

    def get(self, digest: bytes) -> bytes:
        """A content, checked.

        Raises:
            DataCorruptError: it is not there, or damaged.
        """
        return self._packs.get(digest)

    def close(self) -> None:
        """Lets go."""
        self._packs.close()
        self._directory.cleanup()


def read_manifest(path: Path) -> Backup:
    """What an archive holds.

    Raises:
        DataCorruptError: it is none, or cut off.
    """
    with path.open("rb") as file:
        return _manifest(file)


def _manifest(file: BinaryIO) -> Backup:
    end = os.fstat(file.fileno()).st_size
    at = 0
    while at < end:
        file.seek(at)
        try:
            head = parse(file.read(HEADER))
        except DataCorruptError as error:
            raise DataCorruptError(
                "this is no backup" if at == 0 else f"the backup is damaged at byte {at}",
                action="send what croft backup create --to - has written",
            ) from error
        if head.kind == MANIFEST_KIND:
            break
        at += HEADER + head.stored
    else:
        raise DataCorruptError(
            "the backup is cut off: its end is missing", action="make it again, and send it whole"
        )
    file.seek(at)
    record = read_record(file)
    if record is None or file.read(1):
        raise DataCorruptError("the backup has more behind its end", action="send it alone")
    return decode_manifest(Decoder().content(*record))
