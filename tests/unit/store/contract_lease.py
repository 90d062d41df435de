"""What every store must do: leases."""

import asyncio
import contextlib

import pytest

from tests.unit.store.contract import Base, Harness
from tests.unit.store.contract_watch import take
from tests.unit.store.records import vm, volume
from undercroft.model.errors import ConflictError, InvalidError
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.store.interface import Put, Store, Transaction


class LeaseContract(Base):
    """Leases."""

    async def test_expiry_removes_what_hangs_on_it(self, store: Store, harness: Harness):
        lease = await store.lease(10.0)
        one, two, other = vm("one"), volume("two"), vm("other")
        revision = await store.transact(
            Transaction(puts=[Put(one, lease.id), Put(two, lease.id), Put(other)])
        )
        await harness.pass_time(store, 9.0)
        assert await store.get(VM, one.meta.id) is not None
        async with contextlib.aclosing(store.watch([VM, Volume], revision)) as watch:
            await harness.pass_time(store, 2.0)
            (changes,) = await take(watch, 1)
        assert {(c.kind, c.id, c.record) for c in changes.changes} == {
            (VM, one.meta.id, None),
            (Volume, two.meta.id, None),
        }
        assert changes.revision > revision
        assert await store.get(VM, one.meta.id) is None
        assert await store.get(Volume, two.meta.id) is None
        assert await store.get(VM, other.meta.id) is not None

    async def test_kept_it_lasts(self, store: Store, harness: Harness):
        lease = await store.lease(10.0)
        one = vm()
        await store.transact(Transaction(puts=[Put(one, lease.id)]))
        for _ in range(4):
            await harness.pass_time(store, 6.0)
            await lease.keep()
        assert await store.get(VM, one.meta.id) is not None
        await harness.pass_time(store, 11.0)
        assert await store.get(VM, one.meta.id) is None

    async def test_once_over_it_stays_over(self, store: Store, harness: Harness):
        lease = await store.lease(10.0)
        await harness.pass_time(store, 11.0)
        with pytest.raises(ConflictError):
            await lease.keep()
        with pytest.raises(ConflictError):
            await store.transact(Transaction(puts=[Put(vm(), lease.id)]))
        assert (await store.list(VM)).items == []
        await lease.end()

    async def test_ended(self, store: Store):
        lease = await store.lease(10.0)
        one = vm()
        revision = await store.transact(Transaction(puts=[Put(one, lease.id)]))
        async with contextlib.aclosing(store.watch([VM], revision)) as watch:
            await lease.end()
            assert await store.get(VM, one.meta.id) is None
            (changes,) = await take(watch, 1)
        assert changes.changes[0].record is None
        with pytest.raises(ConflictError):
            await lease.keep()

    async def test_a_lease_that_never_was(self, store: Store):
        with pytest.raises(ConflictError):
            await store.transact(Transaction(puts=[Put(vm(), "lease-none")]))

    async def test_the_last_put_decides(self, store: Store, harness: Harness):
        first, second = await store.lease(10.0), await store.lease(100.0)
        a, b = vm("a"), vm("b")
        await store.transact(Transaction(puts=[Put(a, first.id), Put(b, first.id)]))
        await store.transact(Transaction(puts=[Put(a), Put(b, second.id)]))
        await harness.pass_time(store, 11.0)
        assert len((await store.list(VM)).items) == 2
        await harness.pass_time(store, 100.0)
        assert [i.record.meta.id for i in (await store.list(VM)).items] == [a.meta.id]

    async def test_leases_do_not_touch_one_another(self, store: Store, harness: Harness):
        leases = [await store.lease(ttl) for ttl in (5.0, 15.0, 25.0)]
        records = [vm(f"v{n}") for n in range(3)]
        for lease, record in zip(leases, records, strict=True):
            await store.transact(Transaction(puts=[Put(record, lease.id)]))
        for left in (2, 1, 0):
            await harness.pass_time(store, 10.0)
            assert len((await store.list(VM)).items) == left

    async def test_after_a_restart_its_time_begins_anew(self, store: Store, harness: Harness):
        lease = await store.lease(10.0)
        one = vm()
        await store.transact(Transaction(puts=[Put(one, lease.id)]))
        await harness.pass_time(store, 8.0)
        await store.close()
        again = await harness.open()
        try:
            await harness.pass_time(again, 8.0)
            assert await again.get(VM, one.meta.id) is not None
            await harness.pass_time(again, 8.0)
            assert await again.get(VM, one.meta.id) is None
        finally:
            await again.close()

    async def test_ended_while_writes_come_in(self, store: Store):
        """Whatever the order: afterwards nothing hangs on it."""
        lease = await store.lease(10.0)
        writes = [store.transact(Transaction(puts=[Put(vm(), lease.id)])) for _ in range(20)]
        outcomes = await asyncio.gather(
            *writes[:10], lease.end(), *writes[10:], return_exceptions=True
        )
        assert all(o is None or isinstance(o, int | ConflictError) for o in outcomes)
        assert (await store.list(VM)).items == []

    @pytest.mark.parametrize("ttl", [0.0, -1.0, float("nan"), float("inf")])
    async def test_no_time_to_live(self, store: Store, ttl: float):
        with pytest.raises(InvalidError):
            await store.lease(ttl)
