"""Where things are written down: the one interface over SQLite and etcd.

A store holds records (`undercroft.model` objects) under their kind and id. Every transaction gets
a revision, higher than the last; a record remembers the revision that wrote it. Transactions
compare before they write, all or nothing. A watch delivers what changed, in order, from a
revision on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

from undercroft.model.base import Record
from undercroft.model.errors import StaleError

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, slots=True)
class Versioned(Generic[R]):
    """A record and the revision of the transaction that last wrote it."""

    record: R
    revision: int


@dataclass(frozen=True, slots=True)
class Listing(Generic[R]):
    """Records as they all were at one revision, in order of id."""

    items: list[Versioned[R]]
    revision: int


@dataclass(frozen=True, slots=True)
class Check:
    """The record must be at exactly this revision; 0: must not exist."""

    kind: type[Record]
    id: str
    revision: int


@dataclass(frozen=True, slots=True)
class Exists:
    """The record must exist, at whatever revision (an image that a VM is made from)."""

    kind: type[Record]
    id: str


@dataclass(frozen=True, slots=True)
class Put:
    """Write the record under its kind and id; with ``lease`` it vanishes when that ends.

    The last put decides: one without a lease makes the record stay.
    """

    record: Record
    lease: str | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove the record; nothing happens if there is none."""

    kind: type[Record]
    id: str


@dataclass(frozen=True, slots=True)
class Claim:
    """Take a unique name for an object; fails if another object holds it.

    ``scope`` is ``kind/project``; a host port or address can be claimed likewise.
    """

    scope: str
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Release:
    """Give a name back, if this object holds it."""

    scope: str
    name: str
    id: str


@dataclass(frozen=True, slots=True)
class Transaction:
    """Conditions and writes that take effect together or not at all.

    Names are released before they are claimed, so that a name can change hands within one
    transaction. A record may be put or deleted once in a transaction, not both.
    """

    checks: Sequence[Check | Exists] = ()
    claims: Sequence[Claim] = ()
    puts: Sequence[Put] = ()
    deletes: Sequence[Delete] = ()
    releases: Sequence[Release] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """One record written (``record`` set) or removed (None) at ``revision``."""

    kind: type[Record]
    id: str
    record: Record | None
    revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """All changes of one transaction, within the watched kinds."""

    revision: int
    changes: list[Change] = field(default_factory=list)


class Watch(Protocol):
    """An iterator over changes, for one reader.

    A reader that is cancelled while it waits (`asyncio.timeout`) loses nothing and can go on
    reading. ``aclose`` ends the iteration, also for a reader that is waiting in another task; use
    it with `contextlib.aclosing`.
    """

    def __aiter__(self) -> Self:
        """Itself."""

    async def __anext__(self) -> Changes:
        """The next transaction that changed something in the watched kinds."""

    async def aclose(self) -> None:
        """Ends it. May be called more than once."""


class Lease(Protocol):
    """A promise to be alive, with a time to live in seconds."""

    id: str
    ttl: float

    async def keep(self) -> None:
        """Begins the time to live anew.

        Raises:
            ConflictError: the lease has ended already, and what hung on it is gone.
        """

    async def end(self) -> None:
        """Ends it now: what hangs on it is removed. Does nothing if it has ended already."""


class Store(Protocol):
    """The interface.

    Whoever saw the revision of a transaction (returned, listed or watched) sees its effects in all
    that is read afterwards. Records that come back are shared: they must not be changed, nor the
    dicts in them.

    All methods may raise `NoSpaceError` (disk full), `UnavailableError` (the store cannot be
    reached) and `DataCorruptError`.
    """

    async def get(self, kind: type[R], id: str) -> Versioned[R] | None:
        """The record, or None."""

    async def list(self, kind: type[R]) -> Listing[R]:
        """All records of a kind."""

    async def resolve(self, scope: str, name: str) -> str | None:
        """The id of the object that claimed the name, or None."""

    async def revision(self) -> int:
        """The revision of the last transaction (0: none yet)."""

    async def transact(self, transaction: Transaction) -> int:
        """Carries the transaction out, durably, and returns its revision.

        A caller that is cancelled while it waits does not know whether it was carried out; but it
        will not be later.

        Raises:
            StaleError: a check failed; ``data`` has ``kind``, ``id``, ``expected`` (a revision, 0:
                none, or None: any) and ``found`` (a revision, or 0: none).
            AlreadyExistsError: a claimed name is taken; ``data`` has ``scope``, ``name`` and
                ``holder``.
            ConflictError: a lease to put with has ended.
            InvalidError: a record that could not be read back (a NaN), or put or deleted twice.
        """

    def watch(self, kinds: Sequence[type[Record]], from_revision: int) -> Watch:
        """All later changes: those of revisions above ``from_revision``, in order, without gaps.

        Ends only with ``aclose``, or when the store is closed. A slow reader loses nothing while
        history is kept.

        Raises (while iterating):
            CompactedError: history that far back is gone, or the revision is one that this store
                has not reached (it was replaced): list, then watch from the listing.
        """

    async def lease(self, ttl: float) -> Lease:
        """A new lease, to be kept more often than every ``ttl`` seconds."""

    async def compact(self, keep: int) -> None:
        """Forgets history except for the last ``keep`` revisions."""

    async def close(self) -> None:
        """Finishes what is under way. Watches end; leases stay as they are. May be called again."""


async def update(
    store: Store, kind: type[R], id: str, change: Callable[[R], R | None], attempts: int = 50
) -> Versioned[R] | None:
    """Applies a pure function to a record until it is written without interference.

    Returns the record as written; as it is if ``change`` returned it unchanged or None; and None if
    the record does not exist.

    Raises:
        StaleError: others kept interfering.
    """
    for attempt in range(attempts):
        current = await store.get(kind, id)
        if current is None:
            return None
        wanted = change(current.record)
        if wanted is None or wanted == current.record:
            return current
        try:
            revision = await store.transact(
                Transaction(checks=[Check(kind, id, current.revision)], puts=[Put(wanted)])
            )
        except StaleError:
            if attempt == attempts - 1:
                raise
            continue
        return Versioned(wanted, revision)
    raise AssertionError("unreachable")
