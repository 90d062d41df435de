"""The embedded store: one SQLite file, in the daemon's own process."""

from undercroft.store.sqlite.store import SQLiteStore

__all__ = ["SQLiteStore"]
