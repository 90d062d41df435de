"""A transaction in SQL: prepared on the event loop, carried out by the writer."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from undercroft.model.base import Record
from undercroft.model.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidError,
    StaleError,
)
from undercroft.store.interface import Change, Check, Claim, Release, Transaction
from undercroft.store.sqlite.codec import Codec

# Carries out work in an open transaction, as the given revision; returns what it changed in the
# history, or None if it is not a transaction of its own (no revision is used up).
Work = Callable[[sqlite3.Connection, int], "list[Change] | None"]

_LogRow = tuple[int, int, str, str, int, str | None]  # as in the table ``change``


@dataclass(frozen=True, slots=True)
class _Write:
    """A record to write: its kind, id, lease, text, and what it reads back as."""

    kind: str
    id: str
    lease: str | None
    text: str
    record: Record


@dataclass(frozen=True, slots=True)
class Prepared:
    """A transaction with everything encoded and checked that needs no database."""

    checks: list[tuple[str, str, int | None]]  # kind, id, revision (None: any)
    releases: list[Release]
    claims: list[Claim]
    deletes: list[tuple[str, str, type[Record]]]
    writes: list[_Write]

    def __call__(self, db: sqlite3.Connection, revision: int) -> list[Change]:
        """Carries it out; see `Work` and `Store.transact` for the errors."""
        for kind, id, expected in self.checks:
            row = db.execute(
                "SELECT revision FROM record WHERE kind = ? AND id = ?", (kind, id)
            ).fetchone()
            found = row[0] if row else 0
            if found != expected and (expected is not None or not found):
                raise _stale(kind, id, expected, found)
        for release in self.releases:
            db.execute(
                "DELETE FROM claim WHERE scope = ? AND name = ? AND id = ?",
                (release.scope, release.name, release.id),
            )
        for claim in self.claims:
            _claim(db, claim)
        for lease in {write.lease for write in self.writes} - {None}:
            if db.execute("SELECT 1 FROM lease WHERE id = ?", (lease,)).fetchone() is None:
                raise ConflictError(f"lease {lease} has ended", lease=lease)
        changes = [
            Change(cls, id, None, revision)
            for kind, id, cls in self.deletes
            if db.execute("DELETE FROM record WHERE kind = ? AND id = ?", (kind, id)).rowcount
        ]
        log: list[_LogRow] = [
            (revision, n, c.kind.kind, c.id, 0, None) for n, c in enumerate(changes)
        ]
        for write in self.writes:
            db.execute(
                "INSERT INTO record (kind, id, revision, lease, value) VALUES (?, ?, ?, ?, ?) "
                "ON CONFLICT (kind, id) DO UPDATE SET revision = excluded.revision, "
                "lease = excluded.lease, value = excluded.value",
                (write.kind, write.id, revision, write.lease, write.text),
            )
            size = len(write.text)
            log.append((revision, len(changes), write.kind, write.id, size, write.text))
            changes.append(Change(type(write.record), write.id, write.record, revision))
        _log(db, log)
        return changes


def prepare(transaction: Transaction, codec: Codec) -> Prepared:
    """Encodes a transaction.

    Raises:
        InvalidError: see `Store.transact`.
    """
    deletes = [(codec.kind(d.kind), d.id, d.kind) for d in transaction.deletes]
    writes: list[_Write] = []
    for put in transaction.puts:
        text, record = codec.encode(put.record)
        writes.append(_Write(record.kind, record.meta.id, put.lease, text, record))
    touched = [(kind, id) for kind, id, _ in deletes] + [(w.kind, w.id) for w in writes]
    if len(set(touched)) != len(touched):
        raise InvalidError("a transaction writes one record twice")
    return Prepared(
        checks=[
            (codec.kind(c.kind), c.id, c.revision if isinstance(c, Check) else None)
            for c in transaction.checks
        ],
        releases=list(transaction.releases),
        claims=list(transaction.claims),
        deletes=deletes,
        writes=writes,
    )


def begin_lease(id: str, ttl: float) -> Work:
    """Writes a lease down."""

    def work(db: sqlite3.Connection, revision: int) -> list[Change]:
        db.execute("INSERT INTO lease VALUES (?, ?)", (id, ttl))
        return []

    return work


def end_lease(id: str, codec: Codec) -> Work:
    """Removes a lease, and all records that hang on it."""

    def work(db: sqlite3.Connection, revision: int) -> list[Change]:
        rows = db.execute("DELETE FROM record WHERE lease = ? RETURNING kind, id", (id,)).fetchall()
        db.execute("DELETE FROM lease WHERE id = ?", (id,))
        _log(db, [(revision, n, kind, key, 0, None) for n, (kind, key) in enumerate(rows)])
        return [Change(codec.kinds[kind], key, None, revision) for kind, key in rows]

    return work


def compact(keep: int, budget: int | None = None) -> Work:
    """Forgets all but the last ``keep`` revisions, and as many more as it takes for the texts in
    the history to be no more than ``budget`` bytes. Never raises what is forgotten already."""

    def work(db: sqlite3.Connection, revision: int) -> None:
        # ``logged`` covers what was committed, not yet what this batch has added.
        committed, compacted, logged = db.execute(
            "SELECT revision, compacted, logged FROM state"
        ).fetchone()
        cut = max(compacted, revision - 1 - keep)  # revision is the next one
        (freed,) = db.execute(
            "SELECT coalesce(sum(size), 0) FROM change WHERE revision <= ?", (min(cut, committed),)
        ).fetchone()
        if budget is not None and logged - freed > budget:
            for candidate, size in db.execute(
                "SELECT revision, size FROM change WHERE revision > ? AND revision <= ? "
                "ORDER BY revision",
                (cut, committed),
            ):
                if logged - freed <= budget and candidate > cut:
                    break
                cut = candidate
                freed += size
        db.execute("DELETE FROM change WHERE revision <= ?", (cut,))
        db.execute("UPDATE state SET compacted = ?, logged = logged - ?", (cut, freed))

    return work


def _claim(db: sqlite3.Connection, claim: Claim) -> None:
    if db.execute(
        "INSERT INTO claim VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (claim.scope, claim.name, claim.id),
    ).rowcount:
        return
    (holder,) = db.execute(
        "SELECT id FROM claim WHERE scope = ? AND name = ?", (claim.scope, claim.name)
    ).fetchone()
    if holder != claim.id:
        raise AlreadyExistsError(
            f"{claim.name!r} is taken in {claim.scope}",
            object=f"{claim.scope} {claim.name}",
            action="choose another name",
            scope=claim.scope,
            name=claim.name,
            holder=holder,
        )


def _log(db: sqlite3.Connection, rows: list[_LogRow]) -> None:
    for row in rows:
        db.execute("INSERT INTO change VALUES (?, ?, ?, ?, ?, ?)", row)


def _stale(kind: str, id: str, expected: int | None, found: int) -> StaleError:
    if expected == 0:
        message = f"{kind} {id} exists already"
    elif not found:
        message = f"{kind} {id} does not exist"
    else:
        message = f"{kind} {id} was changed meanwhile"
    return StaleError(
        message,
        object=f"{kind} {id}",
        action="read it again, and repeat the change",
        kind=kind,
        id=id,
        expected=expected,
        found=found,
    )
