"""What every store must do, whatever it is made of.

A test module for a store subclasses `StoreContract` and the classes of the other ``contract_*``
modules, each with a fixture ``harness``.
"""

import asyncio
import math
from typing import Protocol

import pytest

from tests.unit.store.records import event, vm, volume
from undercroft.model.errors import (
    AlreadyExistsError,
    InvalidError,
    StaleError,
    UnavailableError,
)
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.store.interface import (
    Check,
    Claim,
    Delete,
    Exists,
    Put,
    Release,
    Store,
    Transaction,
    update,
)


class Harness(Protocol):
    """Makes the store under test and controls the world around it."""

    async def open(self) -> Store:
        """The store, with all that was ever written to it."""

    async def pass_time(self, store: Store, seconds: float) -> None:
        """Returns when so much time has passed for leases, and those that ended are gone."""

    def dispose(self) -> None:
        """Removes everything."""


class Base:
    """Gives each test an open store."""

    @pytest.fixture
    async def store(self, harness: Harness):
        store = await harness.open()
        yield store
        await store.close()


class StoreContract(Base):
    """Records, transactions, names."""

    async def test_begins_empty(self, store: Store):
        assert await store.revision() == 0
        assert await store.get(VM, vm().meta.id) is None
        listing = await store.list(VM)
        assert listing.items == []
        assert listing.revision == 0
        assert await store.resolve("vm/default", "web1") is None

    async def test_what_was_put_is_there(self, store: Store):
        one = vm("one")
        revision = await store.transact(Transaction(puts=[Put(one)]))
        assert revision > 0
        found = await store.get(VM, one.meta.id)
        assert found is not None
        assert found.record == one
        assert type(found.record) is VM
        assert found.revision == revision == await store.revision()

    async def test_put_again_replaces(self, store: Store):
        id = vm().meta.id
        first = await store.transact(Transaction(puts=[Put(vm(id=id, cpus=1))]))
        second = await store.transact(Transaction(puts=[Put(vm(id=id, cpus=2))]))
        assert second > first
        found = await store.get(VM, id)
        assert found is not None
        assert (found.record.spec.cpus, found.revision) == (2, second)
        assert len((await store.list(VM)).items) == 1

    @pytest.mark.parametrize(
        "text",
        ["", "\x00\x1f\x7f", "\u2028 é 🕸", '"\\\n', "x" * (1 << 20)],
        ids=["empty", "control", "unicode", "quotes", "long"],
    )
    async def test_text_comes_back_as_it_was(self, store: Store, text: str):
        record = event(text)
        await store.transact(Transaction(puts=[Put(record)]))
        found = await store.get(Event, record.meta.id)
        assert found is not None
        assert found.record.message == text

    async def test_numbers_come_back_as_they_were(self, store: Store):
        numbers = [0.1, 1e300, -0.0, 2**53 + 1, 2**63, -(2**63), 1.7976931348623157e308]
        record = event("numbers", data=numbers)
        await store.transact(Transaction(puts=[Put(record)]))
        found = await store.get(Event, record.meta.id)
        assert found is not None
        assert found.record.data["value"] == numbers

    async def test_list_is_of_one_kind_in_order_of_id(self, store: Store):
        records = [vm(f"v{n}") for n in range(20)]
        for record in records:
            await store.transact(Transaction(puts=[Put(record), Put(volume())]))
        listing = await store.list(VM)
        assert [item.record.meta.id for item in listing.items] == sorted(
            record.meta.id for record in records
        )
        assert listing.revision == await store.revision()
        for item in listing.items:
            assert await store.get(VM, item.record.meta.id) == item

    async def test_the_same_id_under_two_kinds(self, store: Store):
        id = vm().meta.id
        await store.transact(Transaction(puts=[Put(vm(id=id)), Put(volume(id=id))]))
        await store.transact(Transaction(deletes=[Delete(VM, id)]))
        assert await store.get(VM, id) is None
        assert await store.get(Volume, id) is not None

    async def test_one_transaction_has_one_revision(self, store: Store):
        a, b = vm("a"), volume("b")
        revision = await store.transact(Transaction(puts=[Put(a), Put(b)]))
        found = [await store.get(VM, a.meta.id), await store.get(Volume, b.meta.id)]
        assert [item.revision for item in found if item] == [revision, revision]

    async def test_a_check_holds_at_the_revision(self, store: Store):
        one = vm()
        first = await store.transact(
            Transaction(checks=[Check(VM, one.meta.id, 0)], puts=[Put(one)])
        )
        await store.transact(Transaction(puts=[Put(vm("other"))]))
        second = await store.transact(
            Transaction(checks=[Check(VM, one.meta.id, first)], puts=[Put(one)])
        )
        with pytest.raises(StaleError) as caught:
            await store.transact(Transaction(checks=[Check(VM, one.meta.id, first)]))
        assert caught.value.data == {
            "kind": "vm",
            "id": one.meta.id,
            "expected": first,
            "found": second,
        }

    async def test_a_check_for_absence(self, store: Store):
        one = vm()
        revision = await store.transact(Transaction(puts=[Put(one)]))
        with pytest.raises(StaleError) as caught:
            await store.transact(Transaction(checks=[Check(VM, one.meta.id, 0)], puts=[Put(one)]))
        assert caught.value.data["expected"] == 0
        assert caught.value.data["found"] == revision

    async def test_a_check_on_something_gone(self, store: Store):
        one = vm()
        revision = await store.transact(Transaction(puts=[Put(one)]))
        await store.transact(Transaction(deletes=[Delete(VM, one.meta.id)]))
        with pytest.raises(StaleError) as caught:
            await store.transact(Transaction(checks=[Check(VM, one.meta.id, revision)]))
        assert caught.value.data["found"] == 0
        await store.transact(Transaction(checks=[Check(VM, one.meta.id, 0)], puts=[Put(one)]))

    async def test_exists(self, store: Store):
        one = vm()
        with pytest.raises(StaleError) as caught:
            await store.transact(Transaction(checks=[Exists(VM, one.meta.id)]))
        assert caught.value.data == {
            "kind": "vm",
            "id": one.meta.id,
            "expected": None,
            "found": 0,
        }
        await store.transact(Transaction(puts=[Put(one)]))
        await store.transact(Transaction(checks=[Exists(VM, one.meta.id)], puts=[Put(volume())]))

    async def test_checks_see_the_state_before(self, store: Store):
        one = vm()
        with pytest.raises(StaleError):
            await store.transact(Transaction(checks=[Exists(VM, one.meta.id)], puts=[Put(one)]))

    @pytest.mark.parametrize("how", ["check", "claim"])
    async def test_a_failed_transaction_leaves_no_trace(self, store: Store, how: str):
        kept, other = vm("kept"), vm("other")
        before = await store.transact(
            Transaction(puts=[Put(kept)], claims=[Claim("vm/default", "kept", kept.meta.id)])
        )
        with pytest.raises(StaleError if how == "check" else AlreadyExistsError):
            await store.transact(
                Transaction(
                    checks=[Exists(VM, "vm-0000000000000000")] if how == "check" else [],
                    claims=[
                        Claim("vm/default", "fresh", other.meta.id),
                        Claim("vm/default", "kept" if how == "claim" else "x", other.meta.id),
                    ],
                    puts=[Put(other)],
                    deletes=[Delete(VM, kept.meta.id)],
                    releases=[Release("vm/other", "kept", kept.meta.id)],
                )
            )
        assert await store.revision() == before
        assert await store.get(VM, other.meta.id) is None
        assert await store.get(VM, kept.meta.id) is not None
        assert await store.resolve("vm/default", "fresh") is None
        assert await store.resolve("vm/default", "kept") == kept.meta.id

    async def test_delete(self, store: Store):
        one = vm()
        await store.transact(Transaction(puts=[Put(one)]))
        revision = await store.transact(Transaction(deletes=[Delete(VM, one.meta.id)]))
        assert await store.get(VM, one.meta.id) is None
        assert (await store.list(VM)).items == []
        assert await store.transact(Transaction(deletes=[Delete(VM, one.meta.id)])) > revision

    @pytest.mark.parametrize("second", ["put", "delete"])
    async def test_one_record_twice_in_a_transaction(self, store: Store, second: str):
        one = vm()
        with pytest.raises(InvalidError):
            await store.transact(
                Transaction(
                    puts=[Put(one)] * (2 if second == "put" else 1),
                    deletes=[Delete(VM, one.meta.id)] if second == "delete" else [],
                )
            )
        assert await store.revision() == 0

    async def test_what_could_not_be_read_back_is_refused(self, store: Store):
        from msgspec.structs import replace

        bad = volume()
        bad = replace(bad, meta=replace(bad.meta, created=math.nan))
        with pytest.raises(InvalidError):
            await store.transact(Transaction(puts=[Put(bad)]))
        assert (await store.list(Volume)).items == []

    async def test_what_was_handed_in_can_change_later(self, store: Store):
        """The store keeps what a record was when it was put."""
        data = {"list": [1]}
        record = event("mutable", data=data)
        revision = await store.revision()
        watch = store.watch([Event], revision)
        await store.transact(Transaction(puts=[Put(record)]))
        data["list"].append(2)
        found = await store.get(Event, record.meta.id)
        assert found is not None
        assert found.record.data == {"value": {"list": [1]}}
        changes = await anext(watch)
        assert changes.changes[0].record == found.record
        await watch.aclose()

    async def test_claims(self, store: Store):
        await store.transact(Transaction(claims=[Claim("vm/default", "web1", "a")]))
        assert await store.resolve("vm/default", "web1") == "a"
        assert await store.resolve("vm/other", "web1") is None
        with pytest.raises(AlreadyExistsError) as caught:
            await store.transact(Transaction(claims=[Claim("vm/default", "web1", "b")]))
        assert caught.value.data == {"scope": "vm/default", "name": "web1", "holder": "a"}
        await store.transact(Transaction(claims=[Claim("vm/other", "web1", "b")]))
        assert await store.resolve("vm/other", "web1") == "b"

    async def test_claim_again_by_the_holder(self, store: Store):
        for _ in range(2):
            await store.transact(Transaction(claims=[Claim("vm/default", "web1", "a")]))
        assert await store.resolve("vm/default", "web1") == "a"

    async def test_two_claims_of_one_name_in_one_transaction(self, store: Store):
        with pytest.raises(AlreadyExistsError):
            await store.transact(Transaction(claims=[Claim("s", "n", "a"), Claim("s", "n", "b")]))
        assert await store.resolve("s", "n") is None

    async def test_release_only_by_the_holder(self, store: Store):
        await store.transact(Transaction(claims=[Claim("s", "n", "a")]))
        await store.transact(Transaction(releases=[Release("s", "n", "b")]))
        assert await store.resolve("s", "n") == "a"
        await store.transact(Transaction(releases=[Release("s", "n", "a")]))
        assert await store.resolve("s", "n") is None
        await store.transact(Transaction(releases=[Release("s", "n", "a")]))

    async def test_a_name_changes_hands(self, store: Store):
        await store.transact(Transaction(claims=[Claim("s", "x", "a"), Claim("s", "y", "b")]))
        await store.transact(
            Transaction(
                releases=[Release("s", "x", "a"), Release("s", "y", "b")],
                claims=[Claim("s", "y", "a"), Claim("s", "x", "b")],
            )
        )
        assert await store.resolve("s", "x") == "b"
        assert await store.resolve("s", "y") == "a"

    async def test_revisions_rise(self, store: Store):
        revisions = [await store.transact(Transaction(puts=[Put(vm())])) for _ in range(5)]
        assert revisions == sorted(set(revisions))

    async def test_survives_closing(self, store: Store, harness: Harness):
        one = vm()
        revision = await store.transact(
            Transaction(puts=[Put(one)], claims=[Claim("s", "n", one.meta.id)])
        )
        await store.close()
        again = await harness.open()
        try:
            found = await again.get(VM, one.meta.id)
            assert found is not None
            assert (found.record, found.revision) == (one, revision)
            assert await again.resolve("s", "n") == one.meta.id
            assert await again.revision() == revision
            assert await again.transact(Transaction(puts=[Put(vm())])) > revision
        finally:
            await again.close()

    async def test_closing_finishes_what_is_under_way(self, store: Store, harness: Harness):
        records = [vm() for _ in range(20)]
        pending = [
            asyncio.create_task(store.transact(Transaction(puts=[Put(record)])))
            for record in records
        ]
        await asyncio.sleep(0)
        await store.close()
        revisions = await asyncio.gather(*pending)
        again = await harness.open()
        try:
            for record, revision in zip(records, revisions, strict=True):
                found = await again.get(VM, record.meta.id)
                assert found is not None
                assert found.revision == revision
        finally:
            await again.close()

    async def test_a_closed_store_says_so(self, store: Store):
        await store.close()
        await store.close()
        with pytest.raises(UnavailableError):
            await store.get(VM, "x")
        with pytest.raises(UnavailableError):
            await store.transact(Transaction())
        with pytest.raises(UnavailableError):
            store.watch([VM], 0)


class ConcurrencyContract(Base):
    """Many at once."""

    async def test_no_update_is_lost(self, store: Store):
        one = vm(cpus=0)
        await store.transact(Transaction(puts=[Put(one)]))
        from msgspec.structs import replace

        def more(record: VM) -> VM:
            return replace(record, spec=replace(record.spec, cpus=record.spec.cpus + 1))

        await asyncio.gather(
            *(update(store, VM, one.meta.id, more, attempts=1000) for _ in range(50))
        )
        found = await store.get(VM, one.meta.id)
        assert found is not None
        assert found.record.spec.cpus == 50

    async def test_a_name_is_given_once(self, store: Store):
        outcomes = await asyncio.gather(
            *(
                store.transact(Transaction(claims=[Claim("s", "n", str(n))], puts=[Put(vm())]))
                for n in range(50)
            ),
            return_exceptions=True,
        )
        won = [n for n, outcome in enumerate(outcomes) if isinstance(outcome, int)]
        lost = [o for o in outcomes if isinstance(o, AlreadyExistsError)]
        assert len(won) == 1
        assert len(lost) == 49
        assert {error.data["holder"] for error in lost} == {str(won[0])}
        assert len((await store.list(VM)).items) == 1

    async def test_revisions_are_distinct(self, store: Store):
        revisions = await asyncio.gather(
            *(store.transact(Transaction(puts=[Put(vm())])) for _ in range(100))
        )
        assert len(set(revisions)) == 100
        assert max(revisions) == await store.revision()
        found = {item.revision for item in (await store.list(VM)).items}
        assert found == set(revisions)

    async def test_failures_among_successes(self, store: Store):
        """What is committed together is judged one by one."""

        async def one(n: int) -> bool:
            checks = [Exists(VM, "vm-0000000000000000")] if n % 3 == 0 else []
            try:
                await store.transact(Transaction(checks=checks, puts=[Put(vm(f"n{n}"))]))
            except StaleError:
                return False
            return True

        outcomes = await asyncio.gather(*(one(n) for n in range(60)))
        assert outcomes == [n % 3 != 0 for n in range(60)]
        names = {item.record.meta.name for item in (await store.list(VM)).items}
        assert names == {f"n{n}" for n in range(60) if n % 3}

    async def test_a_failure_among_successes_leaves_no_trace(self, store: Store):
        """It fails half-way, and what is committed with it succeeds."""
        await store.transact(Transaction(claims=[Claim("s", "taken", "a"), Claim("s", "b", "b")]))
        half = Transaction(
            releases=[Release("s", "b", "b")],
            claims=[Claim("s", "fresh", "x"), Claim("s", "taken", "x")],
            puts=[Put(vm("lost"))],
        )
        good = [Transaction(puts=[Put(vm(f"n{n}"))]) for n in range(10)]
        outcomes = await asyncio.gather(
            *(store.transact(t) for t in [*good[:5], half, *good[5:]]), return_exceptions=True
        )
        assert isinstance(outcomes.pop(5), AlreadyExistsError)
        assert all(isinstance(outcome, int) for outcome in outcomes)
        assert await store.resolve("s", "fresh") is None
        assert await store.resolve("s", "b") == "b"
        assert len((await store.list(VM)).items) == 10

    async def test_a_cancelled_caller_harms_nobody(self, store: Store):
        tasks = [
            asyncio.create_task(store.transact(Transaction(puts=[Put(vm(f"n{n}"))])))
            for n in range(20)
        ]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        names = {item.record.meta.name for item in (await store.list(VM)).items}
        for n, outcome in enumerate(outcomes):
            if n % 2:
                assert isinstance(outcome, int)
                assert f"n{n}" in names
        await store.transact(Transaction(puts=[Put(vm())]))

    async def test_what_was_cancelled_does_not_happen_later(self, store: Store):
        for n in range(20):
            one = vm(f"n{n}")
            id = one.meta.id
            task = asyncio.create_task(store.transact(Transaction(puts=[Put(one)])))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
            at_once = await store.get(VM, id)
            await store.transact(Transaction(puts=[Put(vm())]))
            assert await store.get(VM, id) == at_once

    async def test_update_of_what_is_not_there(self, store: Store):
        assert await update(store, VM, "vm-0000000000000000", lambda record: record) is None

    async def test_update_that_changes_nothing_writes_nothing(self, store: Store):
        one = vm()
        revision = await store.transact(Transaction(puts=[Put(one)]))
        for change in (lambda record: None, lambda record: record):
            found = await update(store, VM, one.meta.id, change)
            assert found is not None
            assert found.revision == revision
        assert await store.revision() == revision
