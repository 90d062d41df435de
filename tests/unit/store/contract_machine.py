"""What every store must do, found by trying: random operations, compared with a plain model.

The model is dicts. After every step the store must hold exactly what the model holds, and a watch
that is replayed from any revision still kept must lead from the state then to the state now.
"""

import asyncio
import contextlib
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.unit.store.contract import Harness
from tests.unit.store.records import event, vm, volume
from undercroft.model.base import Record
from undercroft.model.errors import (
    AlreadyExistsError,
    CompactedError,
    ConflictError,
    StaleError,
    UndercroftError,
)
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.store.interface import (
    Check,
    Claim,
    Delete,
    Exists,
    Lease,
    Listing,
    Put,
    Release,
    Store,
    Transaction,
    Watch,
)

T = TypeVar("T")
Key = tuple[type[Record], str]

KINDS: tuple[type[Record], ...] = (VM, Volume, Event)
MAKE = {VM: vm, Volume: volume, Event: event}
keys = st.tuples(st.sampled_from(KINDS), st.sampled_from(["a", "b", "c", "d"]))
names = st.sampled_from(["x", "y", "z"])
scopes = st.sampled_from(["vm/default", "vm/other"])
holders = st.sampled_from(["a", "b"])
claims = st.builds(Claim, scope=scopes, name=names, id=holders)
releases = st.builds(Release, scope=scopes, name=names, id=holders)
ages = st.sampled_from(["now", "absent", "old"])


@dataclass
class Model:
    """What the store should hold."""

    revision: int = 0
    compacted: int = 0
    records: dict[Key, tuple[Record, int, str | None]] = field(default_factory=dict)
    claims: dict[tuple[str, str], str] = field(default_factory=dict)
    leases: dict[str, float] = field(default_factory=dict)  # deadlines; one lease at a time
    states: list[dict[Key, Record]] = field(default_factory=lambda: [{}])  # by revision
    changes: list[dict[Key, Record | None]] = field(default_factory=lambda: [{}])

    def apply(self, transaction: Transaction) -> None:
        """Carries a transaction out; raises the class of error that the store must raise."""
        for check in transaction.checks:
            found = self.records.get((check.kind, check.id), (None, 0, None))[1]
            if isinstance(check, Exists):
                if not found:
                    raise StaleError("")
            elif found != check.revision:
                raise StaleError("")
        held = dict(self.claims)
        for release in transaction.releases:
            if held.get((release.scope, release.name)) == release.id:
                del held[release.scope, release.name]
        for claim in transaction.claims:
            if held.setdefault((claim.scope, claim.name), claim.id) != claim.id:
                raise AlreadyExistsError("")
        for put in transaction.puts:
            if put.lease is not None and put.lease not in self.leases:
                raise ConflictError("")
        self.claims = held
        self.write(
            [(delete.kind, delete.id) for delete in transaction.deletes],
            {(type(put.record), put.record.meta.id): put for put in transaction.puts},
        )

    def write(self, deletes: list[Key], puts: dict[Key, Put]) -> None:
        """One more revision."""
        self.revision += 1
        changes: dict[Key, Record | None] = {}
        for key in deletes:
            if self.records.pop(key, None) is not None:
                changes[key] = None
        for key, put in puts.items():
            self.records[key] = (put.record, self.revision, put.lease)
            changes[key] = put.record
        self.changes.append(changes)
        self.states.append({key: record for key, (record, _, _) in self.records.items()})

    def end(self, lease: str) -> None:
        """Ends a lease."""
        del self.leases[lease]
        self.write([key for key, (_, _, held) in self.records.items() if held == lease], {})


class StoreMachine(RuleBasedStateMachine):
    """Subclasses say how to make the store."""

    harness: Harness
    store: Store

    def make_harness(self) -> Harness:
        """A harness over nothing yet."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.harness = self.make_harness()
        self.model = Model()
        self.clock = 0.0
        self.lease: Lease | None = None
        self.ttl = 0.0
        self.watch: Watch | None = None
        self.seen = 0
        self.store = self.run(self.harness.open())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs until done."""
        return self.loop.run_until_complete(asyncio.wait_for(coroutine, 30))

    def teardown(self) -> None:
        self.run(self.store.close())
        self.loop.close()
        self.harness.dispose()

    @initialize()
    def begin(self) -> None:
        assert self.run(self.store.revision()) == 0

    @rule(
        touched=st.dictionaries(keys, st.one_of(st.none(), st.integers(1, 9)), max_size=4),
        checks=st.lists(st.tuples(keys, ages), max_size=2),
        exists=st.lists(keys, max_size=1),
        claims=st.lists(claims, max_size=2),
        releases=st.lists(releases, max_size=2),
        leased=st.booleans(),
    )
    def transact(self, touched, checks, exists, claims, releases, leased) -> None:
        """Several things at once, mostly possible."""
        lease = next(iter(self.model.leases), None) if leased else None
        transaction = Transaction(
            checks=[
                *(Check(kind, id, self.revision_of((kind, id), age)) for (kind, id), age in checks),
                *(Exists(kind, id) for kind, id in exists),
            ],
            claims=claims,
            releases=releases,
            puts=[
                Put(make_record(key, value), lease)
                for key, value in touched.items()
                if value is not None
            ],
            deletes=[Delete(*key) for key, value in touched.items() if value is None],
        )
        self.both(transaction)

    def revision_of(self, key: Key, age: str) -> int:
        """A revision to check for."""
        if age == "absent":
            return 0
        now = self.model.records.get(key, (None, 0, None))[1]
        return now if age == "now" else max(1, now - 1)

    def both(self, transaction: Transaction) -> None:
        """The model and the store must say the same."""
        try:
            self.model.apply(transaction)
        except UndercroftError as expected:
            with pytest.raises(type(expected)):
                self.run(self.store.transact(transaction))
        else:
            assert self.run(self.store.transact(transaction)) == self.model.revision

    @rule(transactions=st.lists(st.tuples(keys, st.integers(1, 9), claims), max_size=8))
    def many_at_once(self, transactions) -> None:
        """Those that are handed over in order are carried out in order."""
        prepared = [
            Transaction(puts=[Put(make_record(key, value))], claims=[claim])
            for key, value, claim in transactions
        ]

        async def all_at_once() -> list[int | BaseException]:
            return await asyncio.gather(
                *(self.store.transact(t) for t in prepared), return_exceptions=True
            )

        outcomes = self.run(all_at_once())
        for transaction, outcome in zip(prepared, outcomes, strict=True):
            try:
                self.model.apply(transaction)
            except UndercroftError as error:
                expected = type(error)
                assert type(outcome) is expected
            else:
                assert outcome == self.model.revision

    @precondition(lambda self: not self.model.leases)
    @rule(ttl=st.integers(1, 20))
    def take_lease(self, ttl: int) -> None:
        self.lease = self.run(self.store.lease(float(ttl)))
        self.ttl = float(ttl)
        self.model.write([], {})
        self.model.leases[self.lease.id] = self.clock + ttl

    @precondition(lambda self: self.lease)
    @rule()
    def keep_lease(self) -> None:
        assert self.lease is not None
        self.run(self.lease.keep())
        self.model.leases[self.lease.id] = self.clock + self.ttl

    @precondition(lambda self: self.lease)
    @rule()
    def end_lease(self) -> None:
        assert self.lease is not None
        self.run(self.lease.end())
        self.model.end(self.lease.id)
        self.lease = None

    @rule(seconds=st.integers(1, 10))
    def pass_time(self, seconds: int) -> None:
        self.clock += seconds
        self.run(self.harness.pass_time(self.store, float(seconds)))
        for id in [id for id, deadline in self.model.leases.items() if deadline <= self.clock]:
            self.model.end(id)
            self.lease = None

    @rule(keep=st.integers(0, 10))
    def compact(self, keep: int) -> None:
        self.run(self.store.compact(keep))
        self.model.compacted = max(self.model.compacted, self.model.revision - keep)
        if self.seen < self.model.compacted:
            self.watch = None

    @rule()
    def reopen(self) -> None:
        self.run(self.store.close())
        self.store = self.run(self.harness.open())
        self.watch = None
        self.lease = None  # nobody holds it any more, but it lasts for its time
        for id in self.model.leases:
            self.model.leases[id] = self.clock + self.ttl

    @rule(back=st.integers(0, 12))
    def begin_watch(self, back: int) -> None:
        after = max(0, self.model.revision - back)
        if after < self.model.compacted:
            with pytest.raises(CompactedError):
                self.run(anext_of(self.store.watch(KINDS, after)))
            return
        self.watch = self.store.watch(KINDS, after)
        self.seen = after

    @precondition(lambda self: self.watch is not None)
    @rule()
    def follow(self) -> None:
        """Replays from the state at the watch's revision to the state now."""
        assert self.watch is not None
        state = dict(self.model.states[self.seen])
        for revision in range(self.seen + 1, self.model.revision + 1):
            expected = self.model.changes[revision]
            if not expected:
                continue
            changes = self.run(anext_of(self.watch))
            assert changes.revision == revision
            found = {(c.kind, c.id): c.record for c in changes.changes}
            assert len(found) == len(changes.changes)
            assert found == expected
            for key, record in found.items():
                if record is None:
                    del state[key]
                else:
                    state[key] = record
        assert state == self.model.states[self.model.revision]
        self.seen = self.model.revision
        with contextlib.suppress(TimeoutError):
            extra = self.loop.run_until_complete(asyncio.wait_for(anext_of(self.watch), 0.002))
            pytest.fail(f"told of something that did not happen: {extra}")

    @invariant()
    def the_same(self) -> None:
        assert self.run(self.store.revision()) == self.model.revision
        for kind in KINDS:
            listing: Listing[Record] = self.run(self.store.list(kind))
            assert listing.revision == self.model.revision
            expected = sorted(
                (key[1], record, revision)
                for key, (record, revision, _) in self.model.records.items()
                if key[0] is kind
            )
            found = [(item.record.meta.id, item.record, item.revision) for item in listing.items]
            assert found == expected
        for scope in ("vm/default", "vm/other"):
            for name in ("x", "y", "z"):
                holder = self.run(self.store.resolve(scope, name))
                assert holder == self.model.claims.get((scope, name))


async def anext_of(watch: Watch) -> Any:
    """The next transaction."""
    return await anext(watch)


def make_record(key: Key, value: int) -> Record:
    """A record of a kind, that differs by value."""
    kind, id = key
    if kind is VM:
        return vm(id=id, cpus=value)
    if kind is Volume:
        return volume(id=id, size=value)
    return event(str(value), id=id)
