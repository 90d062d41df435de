"""Packs: files of records, and the index that tells where each is. All functions here block.

The records are the truth. The index is a cache that is made anew from them whenever it does not
know exactly the packs that are there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from undercroft.model.errors import DataCorruptError
from undercroft.storage.backup.records import (
    HEADER,
    MANIFEST_KIND,
    Decoder,
    Encoder,
    Head,
    digest_of,
    parse,
    read_record,
)
from undercroft.storage.files import sync_directory
from undercroft.storage.threads import Stop

PACK_SIZE = 256 << 20
_PART = ".part"


class Packs:
    """The packs in a directory, with their index. For one thread; close it. ``careful``: what is
    there already is read before it is relied upon."""

    careful = False

    def __init__(self, directory: Path, index: Path | None, *, write: bool = False) -> None:
        self.directory = directory
        self._decoder = Decoder()
        self._encoder: Encoder | None = None
        self._files: dict[int, BinaryIO] = {}
        self._out: BinaryIO | None = None
        self._out_name = ""
        self._out_id = 0
        self._out_size = 0
        self._count = 0
        self.written = 0
        self._db = _open_index(index, write)
        if write:
            self._salvage()
        self._refresh()

    def close(self) -> None:
        """Lets go; what was not finished is left for the next writer to find."""
        for file in self._files.values():
            file.close()
        if self._out is not None:
            with contextlib.suppress(OSError):  # the disk is full
                self._out.close()
        self._db.close()

    # -- looking ----------------------------------------------------------------------------

    def has(self, digest: bytes) -> bool:
        """Whether a content is there."""
        return self._where(digest) is not None

    def get(self, digest: bytes) -> bytes:
        """A content, checked.

        Raises:
            DataCorruptError: it is not there, or damaged.
        """
        return self._decoder.content(*self._record(digest))

    def _record(self, digest: bytes) -> tuple[Head, bytes, bytes]:
        where = self._where(digest)
        if where is None:
            raise DataCorruptError(f"{digest.hex()[:16]}… is not in the repository")
        pack, offset, stored = where
        file = self._file(pack)
        data = os.pread(file.fileno(), HEADER + stored, offset)
        head = parse(data[:HEADER])
        if head.digest != digest or head.stored != stored or len(data) != HEADER + stored:
            raise DataCorruptError("a record is damaged: its header is wrong")
        return head, data[:HEADER], data[HEADER:]

    def where(self, digest: bytes) -> tuple[str, int, int] | None:
        """In which pack a content is, at which offset, and how many bytes it takes."""
        found = self._where(digest)
        if found is None:
            return None
        (name,) = self._db.execute("select name from pack where id = ?", found[:1]).fetchone()
        return name, found[1], found[2] + HEADER

    def _where(self, digest: bytes) -> tuple[int, int, int] | None:
        try:
            found: tuple[int, int, int] | None = self._db.execute(
                "select pack, offset, stored from chunk where digest = ?", (digest,)
            ).fetchone()
        except sqlite3.DatabaseError as error:
            raise DataCorruptError(
                f"the index of {self.directory.parent} is damaged: {error}",
                action="delete index.db there: it is made anew",
            ) from error
        return found

    def _file(self, pack: int) -> BinaryIO:
        if pack == self._out_id and self._out is not None:
            self._out.flush()
        file = self._files.get(pack)
        if file is None:
            (name,) = self._db.execute("select name from pack where id = ?", (pack,)).fetchone()
            path = self.directory / name
            if self._out is not None and name == self._out_name:
                path = path.with_name(name + _PART)
            try:
                file = path.open("rb", buffering=0)
            except FileNotFoundError:
                raise DataCorruptError(f"{name} is gone from the repository") from None
            while len(self._files) >= 64:
                self._files.pop(next(iter(self._files))).close()
            self._files[pack] = file
        return file

    # -- writing ----------------------------------------------------------------------------

    def put(self, kind: int, content: bytes | bytearray | memoryview, digest: bytes = b"") -> bytes:
        """Adds a content unless it is there; what names it.

        Raises:
            OSError: it cannot be written. DataCorruptError: it is there, but damaged.
        """
        digest = digest or digest_of(content)
        if self.has(digest):
            if self.careful:
                self.get(digest)
            return digest
        if self._encoder is None:
            self._encoder = Encoder()
        self._write(digest, *self._encoder.encode(kind, digest, content))
        return digest

    def _write(self, digest: bytes, header: bytes, body: bytes) -> None:
        if self._out is not None and self._out_size + len(header) + len(body) > PACK_SIZE:
            self.finish()
        out = self._out or self._begin()
        out.write(header)
        out.write(body)
        self._db.execute(
            "insert into chunk values (?, ?, ?, ?)",
            (digest, self._out_id, self._out_size, len(body)),
        )
        self._out_size += len(header) + len(body)
        self.written += len(header) + len(body)

    def _begin(self) -> BinaryIO:
        while True:
            self._count += 1
            self._out_name = f"{os.urandom(8).hex()}-{self._count}.pack"
            if not (self.directory / self._out_name).exists():
                break
        self._out = (self.directory / (self._out_name + _PART)).open("xb", buffering=1 << 20)
        self._out_id = self._add_pack(self._out_name, 0)
        self._out_size = 0
        return self._out

    def finish(self) -> None:
        """Makes all that was put durable.

        Raises:
            OSError: it cannot be.
        """
        out = self._out
        if out is not None:
            out.flush()
            os.fsync(out.fileno())
            out.close()
            part = self.directory / (self._out_name + _PART)
            part.rename(self.directory / self._out_name)
            sync_directory(self.directory)
            self._db.execute(
                "update pack set size = ? where id = ?", (self._out_size, self._out_id)
            )
            self._out = None
        self._db.commit()

    def move(self, name: str, digests: Sequence[bytes], stop: Stop) -> int:
        """Writes these contents of a pack anew and removes the pack; the bytes that were written.
        What is damaged stays so: the pack is left alone then.

        Raises:
            OSError: it cannot be written.
        """
        before = self.written
        if digests:
            copies = []
            for digest in digests:
                stop.check()
                head, header, body = self._record(digest)
                try:
                    self._decoder.content(head, header, body)
                except DataCorruptError:
                    return self.written - before
                copies.append((digest, header, body))
                if sum(len(body) for _, _, body in copies) > 16 << 20:
                    self._append(copies)
                    copies = []
            self._append(copies)
            self.finish()
        for pack, file in list(self._files.items()):
            file.close()
            del self._files[pack]
        self._drop(name)
        self._db.commit()
        (self.directory / name).unlink(missing_ok=True)
        sync_directory(self.directory)
        return self.written - before

    def _append(self, copies: Sequence[tuple[bytes, bytes, bytes]]) -> None:
        for digest, header, body in copies:
            self._db.execute("delete from chunk where digest = ?", (digest,))
            self._write(digest, header, body)

    # -- the index --------------------------------------------------------------------------

    def _add_pack(self, name: str, size: int) -> int:
        cursor = self._db.execute("insert into pack (name, size) values (?, ?)", (name, size))
        return int(cursor.lastrowid or 0)

    def _drop(self, name: str) -> None:
        self._db.execute(
            "delete from chunk where pack in (select id from pack where name = ?)", (name,)
        )
        self._db.execute("delete from pack where name = ?", (name,))

    def _salvage(self) -> None:
        """Keeps of packs that were never finished what is whole: whoever repeats that backup does
        not write it again."""
        for part in self.directory.glob("*.pack" + _PART):
            whole = 0
            with part.open("rb") as file, contextlib.suppress(DataCorruptError):
                while (found := read_record(file)) is not None:
                    self._decoder.content(*found)
                    whole = file.tell()
            if not whole:
                part.unlink()
                continue
            with part.open("r+b") as file:
                file.truncate(whole)
                os.fsync(file.fileno())
            part.rename(part.with_suffix(""))
            sync_directory(self.directory)

    def _refresh(self) -> None:
        """Has the index know exactly the packs that are there."""
        there = {path.name: path.stat().st_size for path in self.directory.glob("*.pack")}
        known = dict(self._db.execute("select name, size from pack").fetchall())
        for name in known:
            if there.get(name) != known[name]:
                self._drop(name)
        for name, size in there.items():
            if known.get(name) != size:
                self._scan(name, size)
        self._db.commit()

    def rebuild(self) -> None:
        """Makes the index anew: what it says is not what is there."""
        self._db.execute("delete from chunk")
        self._db.execute("delete from pack")
        self._refresh()

    def _scan(self, name: str, size: int) -> None:
        id = self._add_pack(name, size)
        with (self.directory / name).open("rb", buffering=1 << 20) as file:
            for digest, offset, stored in scan(file):
                self._db.execute(
                    "insert or ignore into chunk values (?, ?, ?, ?)", (digest, id, offset, stored)
                )

    def names(self) -> list[str]:
        """The packs."""
        return sorted(row[0] for row in self._db.execute("select name from pack"))

    def chunks(self, name: str) -> list[tuple[bytes, int]]:
        """What the index has of a pack: what names each content, and how many bytes it takes."""
        return [
            (digest, stored + HEADER)
            for digest, stored in self._db.execute(
                "select digest, stored from chunk where pack = "
                "(select id from pack where name = ?) order by offset",
                (name,),
            )
        ]


def scan(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """The records of a pack: what names each, its offset, the bytes that follow its header. One
    that is damaged, so that the next cannot be found, is skipped byte by byte."""
    end = os.fstat(file.fileno()).st_size
    offset = 0
    while offset < end:
        file.seek(offset)
        try:
            head = parse(file.read(HEADER))
        except DataCorruptError:
            offset = _next_magic(file, offset + 1, end)
            continue
        if offset + HEADER + head.stored > end:
            offset = _next_magic(file, offset + 1, end)
            continue
        if head.kind != MANIFEST_KIND:
            yield head.digest, offset, head.stored
        offset += HEADER + head.stored


def _next_magic(file: BinaryIO, offset: int, end: int) -> int:
    while offset < end:
        file.seek(offset)
        data = file.read(1 << 20)
        at = data.find(b"UCP1")
        if at >= 0:
            return offset + at
        offset += max(1, len(data) - 3)
    return end


class _Index(sqlite3.Connection):
    """The index: what the file system refuses is an `OSError`, as everywhere else."""

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        """Raises OSError: it cannot be read or written."""
        try:
            return super().execute(*arguments)
        except sqlite3.OperationalError as error:
            raise _os_error(error) from error

    def commit(self) -> None:
        """Raises OSError: it cannot be written."""
        try:
            super().commit()
        except sqlite3.OperationalError as error:
            raise _os_error(error) from error


def _os_error(error: sqlite3.OperationalError) -> OSError:
    full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
    return OSError(errno.ENOSPC if full else errno.EIO, f"its index: {error}")


def _open_index(path: Path | None, write: bool) -> sqlite3.Connection:
    """The index: its file, or where that cannot be written or believed, one that passes."""
    if path is not None and (write or os.access(path.parent, os.W_OK)):
        for _ in range(2):
            try:
                return _connect(str(path))
            except (sqlite3.DatabaseError, OSError):  # no index: made anew
                with contextlib.suppress(OSError):
                    path.unlink()
    return _connect("")


def _connect(path: str) -> sqlite3.Connection:
    # One thread at a time uses it, but not always the same one.
    db = sqlite3.connect(path, timeout=30.0, check_same_thread=False, factory=_Index)
    try:
        db.execute("pragma synchronous = full")  # what it says is relied upon
        db.execute(
            "create table if not exists pack "
            "(id integer primary key, name text unique, size integer)"
        )
        db.execute(
            "create table if not exists chunk (digest blob primary key, pack integer,"
            " offset integer, stored integer) without rowid"
        )
        db.execute("select count(*) from pack").fetchone()
        db.execute("select count(*) from (select 1 from chunk limit 1)").fetchone()
    except BaseException:
        db.close()
        raise
    return db
