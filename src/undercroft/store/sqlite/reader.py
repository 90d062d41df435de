"""Reads, straight from the event loop: SQLite answers from memory within tens of microseconds."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar, cast

from undercroft.model.base import Record
from undercroft.model.errors import CompactedError
from undercroft.store.interface import Change, Changes, Listing, Versioned
from undercroft.store.sqlite.codec import Codec
from undercroft.store.sqlite.database import translated

R = TypeVar("R", bound=Record)

AT_ONCE = 128  # revisions of history read in one go


class Reader:
    """Owns the connection that reads."""

    def __init__(self, db: sqlite3.Connection, path: Path, codec: Codec) -> None:
        self._db = db
        self._path = path
        self._codec = codec

    def get(self, cls: type[R], id: str) -> Versioned[R] | None:
        """See `Store.get`."""
        kind = self._codec.kind(cls)
        with translated(self._path):
            row = self._db.execute(
                "SELECT value, revision FROM record WHERE kind = ? AND id = ?", (kind, id)
            ).fetchone()
        if row is None:
            return None
        return Versioned(cast(R, self._codec.decode(kind, id, row[0])), row[1])

    def all(self, cls: type[R]) -> Listing[R]:
        """See `Store.list`."""
        kind = self._codec.kind(cls)
        with translated(self._path), self._snapshot():
            revision = self.revision()
            rows = self._db.execute(
                "SELECT id, revision, value FROM record WHERE kind = ? ORDER BY id", (kind,)
            ).fetchall()
        return Listing([Versioned(*row) for row in self._codec.decode_all(cls, rows)], revision)

    def resolve(self, scope: str, name: str) -> str | None:
        """See `Store.resolve`."""
        with translated(self._path):
            row = self._db.execute(
                "SELECT id FROM claim WHERE scope = ? AND name = ?", (scope, name)
            ).fetchone()
        return row[0] if row else None

    def revision(self) -> int:
        """See `Store.revision`."""
        with translated(self._path):
            row = self._db.execute("SELECT revision FROM state").fetchone()
        return int(row[0])

    def leases(self) -> dict[str, float]:
        """Time to live of each lease that is written down."""
        with translated(self._path):
            return dict(self._db.execute("SELECT id, ttl FROM lease").fetchall())

    def history(self, after: int, kinds: Collection[str]) -> tuple[list[Changes], int]:
        """The next transactions after a revision, and the revision up to which that is all.

        Raises:
            CompactedError: they are forgotten, or the revision lies in the future.
        """
        with translated(self._path), self._snapshot():
            last, compacted = self._db.execute("SELECT revision, compacted FROM state").fetchone()
            if not compacted <= after <= last:
                raise CompactedError(
                    f"the changes since revision {after} are not known any more"
                    if after < compacted
                    else f"revision {after} has not been reached: the store was replaced",
                    action="list what there is, and watch from the revision of the listing",
                    compacted=compacted,
                    revision=last,
                )
            upto = min(last, after + AT_ONCE)
            rows = self._db.execute(
                "SELECT revision, kind, id, value FROM change "
                "WHERE revision > ? AND revision <= ? ORDER BY revision, sequence",
                (after, upto),
            ).fetchall()
        found: list[Changes] = []
        for revision, kind, id, text in rows:
            if kind not in kinds:
                continue
            record = None if text is None else self._codec.decode(kind, id, text)
            if not found or found[-1].revision != revision:
                found.append(Changes(revision, []))
            found[-1].changes.append(Change(self._codec.kinds[kind], id, record, revision))
        return found, upto

    def close(self) -> None:
        """Ends it."""
        self._db.close()

    def _snapshot(self) -> _Snapshot:
        return _Snapshot(self._db)


class _Snapshot:
    """Several statements that see one and the same state."""

    __slots__ = ("_db",)

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN")

    def __exit__(self, *exc: object) -> None:
        if self._db.in_transaction:  # some errors end it
            self._db.execute("COMMIT")
