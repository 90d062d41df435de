"""Listings, kept in memory between two calls and brought up to date from the history.

Decoding a thousand VMs takes ten milliseconds in which the event loop does nothing else. A listing
that was asked for once is therefore kept, and what happened since is applied to it, by the same
changes in the same order that a watch delivers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar, cast

from undercroft.model.base import Record
from undercroft.model.errors import CompactedError
from undercroft.store.interface import Listing, Versioned
from undercroft.store.sqlite.history import History
from undercroft.store.sqlite.reader import Reader

R = TypeVar("R", bound=Record)

MOST = 4096  # records of one kind that are kept: some 20 MB
FAR = 512  # revisions: to catch up with more takes longer than to list anew


@dataclass(slots=True)
class _Table:
    """All records of a kind as of a revision. ``ordered`` is None when it is to be made anew."""

    records: dict[str, Versioned[Record]]
    revision: int
    ordered: list[Versioned[Record]] | None


class Tables:
    """The listings that are kept, by kind."""

    def __init__(self, reader: Reader, history: History) -> None:
        self._reader = reader
        self._history = history
        self._tables: dict[str, _Table] = {}

    def list(self, cls: type[R]) -> Listing[R]:
        """See `Store.list`."""
        table = self._tables.get(cls.kind)
        if table is None or not self._catch_up(cls.kind, table):
            listing = self._reader.all(cls)
            self._keep(cls.kind, listing)
            return listing
        if table.ordered is None:
            table.ordered = [table.records[id] for id in sorted(table.records)]
        return Listing(cast("list[Versioned[R]]", table.ordered.copy()), table.revision)

    def forget(self) -> None:
        """Gives the memory back."""
        self._tables.clear()

    def _keep(self, kind: str, listing: Listing[R]) -> None:
        self._tables.pop(kind, None)
        if len(listing.items) <= MOST:
            items = cast("list[Versioned[Record]]", listing.items.copy())
            self._tables[kind] = _Table(
                {item.record.meta.id: item for item in items}, listing.revision, items
            )

    def _catch_up(self, kind: str, table: _Table) -> bool:
        """Applies what happened since; whether that was possible."""
        last = self._reader.revision()
        if not 0 <= last - table.revision <= FAR:
            return False
        while table.revision < last:
            try:
                news, seen = self._history.read(table.revision, frozenset((kind,)))
                if seen == table.revision:
                    # Committed, but not published yet: that takes a turn of the loop we are on.
                    news, seen = self._reader.history(table.revision, frozenset((kind,)))
                table.revision = seen
            except CompactedError:
                return False
            for changes in news:
                table.ordered = None
                for change in changes.changes:
                    if change.record is None:
                        table.records.pop(change.id, None)
                    else:
                        table.records[change.id] = Versioned(change.record, change.revision)
        return len(table.records) <= MOST
