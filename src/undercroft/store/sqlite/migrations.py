"""The shape of the database file, step by step.

``PRAGMA user_version`` counts the steps taken. A released step is never changed; a new one goes to
the end of `MIGRATIONS`. Each runs in a transaction of its own.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Sequence

Migration = Callable[[sqlite3.Connection], None]


def create(db: sqlite3.Connection) -> None:
    """Version 1.

    - ``record``: what is. An ordinary rowid table: the texts are too long for WITHOUT ROWID.
    - ``change``: what became, one row per record and transaction; ``value`` NULL: removed.
    - ``claim``: who holds which name.
    - ``lease``: ``ttl`` in seconds; deadlines are not written down (see `leases`).
    - ``state``: one row. ``revision`` of the last transaction; ``compacted``: history up to and
      including it is forgotten; ``logged``: bytes of text in ``change``.
    """
    for statement in (
        """CREATE TABLE record (
            kind TEXT NOT NULL, id TEXT NOT NULL, revision INTEGER NOT NULL, lease TEXT,
            value TEXT NOT NULL, UNIQUE (kind, id)) STRICT""",
        "CREATE INDEX record_lease ON record (lease) WHERE lease IS NOT NULL",
        """CREATE TABLE change (
            revision INTEGER NOT NULL, sequence INTEGER NOT NULL, kind TEXT NOT NULL,
            id TEXT NOT NULL, size INTEGER NOT NULL, value TEXT,
            UNIQUE (revision, sequence)) STRICT""",
        """CREATE TABLE claim (
            scope TEXT NOT NULL, name TEXT NOT NULL, id TEXT NOT NULL,
            PRIMARY KEY (scope, name)) STRICT, WITHOUT ROWID""",
        "CREATE TABLE lease (id TEXT PRIMARY KEY, ttl REAL NOT NULL) STRICT, WITHOUT ROWID",
        """CREATE TABLE state (
            one INTEGER PRIMARY KEY CHECK (one = 1), revision INTEGER NOT NULL,
            compacted INTEGER NOT NULL, logged INTEGER NOT NULL) STRICT""",
        "INSERT INTO state VALUES (1, 0, 0, 0)",
    ):
        db.execute(statement)


def layers(db: sqlite3.Connection) -> None:
    """Version 2: volumes have layers. The file of each volume becomes its first layer, of which the
    id is that of the volume with another prefix; the host's agent renames the file."""
    revision, *_ = db.execute("SELECT revision FROM state").fetchone()
    rows = db.execute("SELECT id, value FROM record WHERE kind = 'volume'").fetchall()
    for id, value in rows:
        volume = json.loads(value)
        head = "layer-" + id.removeprefix("vol-")
        spec = volume["spec"]
        layer = {
            "meta": {"id": head, "name": head, "created": volume["meta"]["created"]},
            "spec": {key: spec[key] for key in ("host", "size", "image") if spec.get(key)},
            "status": {"state": "ready"},
        }
        volume.setdefault("status", {})["head"] = head
        db.execute(
            "UPDATE record SET value = ? WHERE kind = 'volume' AND id = ?",
            (json.dumps(volume), id),
        )
        db.execute(
            "INSERT INTO record (kind, id, revision, value) VALUES ('layer', ?, ?, ?)",
            (head, revision, json.dumps(layer)),
        )


MIGRATIONS: Sequence[Migration] = (create, layers)
