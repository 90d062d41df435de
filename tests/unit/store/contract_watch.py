"""What every store must do: watches and their history."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.unit.store.contract import Base, Harness
from tests.unit.store.records import event, vm, volume
from undercroft.model.errors import CompactedError
from undercroft.model.event import Event
from undercroft.model.vm import VM
from undercroft.model.volume import Volume
from undercroft.store.interface import Changes, Claim, Delete, Put, Store, Transaction, Watch

GUARD = 100.0  # seconds: only so that a broken store cannot hang the tests


async def take(watch: Watch, count: int) -> list[Changes]:
    """The next transactions."""
    async with asyncio.timeout(GUARD):
        return [await anext(watch) for _ in range(count)]


async def is_silent(watch: Watch) -> bool:
    """Whether nothing more comes."""
    try:
        async with asyncio.timeout(0.05):
            await anext(watch)
    except TimeoutError:
        return True
    return False


class WatchContract(Base):
    """Watches."""

    @pytest.fixture
    async def watches(self) -> AsyncIterator[contextlib.AsyncExitStack]:
        async with contextlib.AsyncExitStack() as stack:
            yield stack

    async def test_history_then_live(self, store: Store):
        records = [vm(f"v{n}") for n in range(6)]
        revisions = [await store.transact(Transaction(puts=[Put(r)])) for r in records[:3]]
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            seen = await take(watch, 3)
            revisions += [await store.transact(Transaction(puts=[Put(r)])) for r in records[3:]]
            seen += await take(watch, 3)
            assert await is_silent(watch)
        assert [changes.revision for changes in seen] == revisions
        assert [changes.changes[0].record for changes in seen] == records
        for changes in seen:
            (change,) = changes.changes
            assert change.kind is VM
            assert change.revision == changes.revision
            assert change.record is not None
            assert change.id == change.record.meta.id

    async def test_begins_after_the_revision(self, store: Store):
        first = await store.transact(Transaction(puts=[Put(vm("a"))]))
        second = await store.transact(Transaction(puts=[Put(vm("b"))]))
        async with contextlib.aclosing(store.watch([VM], first)) as watch:
            assert [c.revision for c in await take(watch, 1)] == [second]
        async with contextlib.aclosing(store.watch([VM], second)) as watch:
            assert await is_silent(watch)

    async def test_wakes_a_waiting_reader(self, store: Store):
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            reader = asyncio.create_task(take(watch, 1))
            await asyncio.sleep(0.01)
            revision = await store.transact(Transaction(puts=[Put(vm())]))
            assert [c.revision for c in await reader] == [revision]

    async def test_only_the_kinds_asked_for(self, store: Store):
        a, b, c = vm(), volume(), event("c")
        revision = await store.transact(Transaction(puts=[Put(a), Put(b), Put(c)]))
        await store.transact(Transaction(puts=[Put(volume())]))
        last = await store.transact(Transaction(puts=[Put(event("d")), Put(vm())]))
        async with contextlib.aclosing(store.watch([VM, Event], 0)) as watch:
            first, second = await take(watch, 2)
            assert {change.kind for change in first.changes} == {VM, Event}
            assert {change.id for change in first.changes} == {a.meta.id, c.meta.id}
            assert (first.revision, second.revision) == (revision, last)
            assert await is_silent(watch)

    async def test_a_transaction_without_records_is_not_told(self, store: Store):
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            await store.transact(Transaction(claims=[Claim("s", "n", "a")]))
            await store.transact(Transaction(deletes=[Delete(VM, "vm-0000000000000000")]))
            revision = await store.transact(Transaction(puts=[Put(vm())]))
            assert [c.revision for c in await take(watch, 1)] == [revision]

    async def test_removals(self, store: Store):
        one = vm()
        await store.transact(Transaction(puts=[Put(one)]))
        revision = await store.transact(Transaction(deletes=[Delete(VM, one.meta.id)]))
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            _, removed = await take(watch, 2)
        (change,) = removed.changes
        assert (change.kind, change.id, change.record) == (VM, one.meta.id, None)
        assert removed.revision == revision

    async def test_every_version_is_told(self, store: Store):
        id = vm().meta.id
        for cpus in range(1, 6):
            await store.transact(Transaction(puts=[Put(vm(id=id, cpus=cpus))]))
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            seen = await take(watch, 5)
        versions = [changes.changes[0].record for changes in seen]
        assert [v.spec.cpus for v in versions if isinstance(v, VM)] == [1, 2, 3, 4, 5]

    async def test_a_reader_that_gave_up_waiting_goes_on(self, store: Store):
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            for _ in range(3):
                assert await is_silent(watch)
            revisions = [await store.transact(Transaction(puts=[Put(vm())])) for _ in range(3)]
            assert [c.revision for c in await take(watch, 3)] == revisions

    async def test_cancelled_at_any_moment_nothing_is_lost(self, store: Store):
        revisions: list[int] = []
        seen: list[int] = []

        async def write() -> None:
            for _ in range(60):
                revisions.append(await store.transact(Transaction(puts=[Put(vm())])))

        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            writer = asyncio.create_task(write())
            turns = 0
            while len(seen) < 60:
                reader = asyncio.create_task(watch.__anext__())
                for _ in range(turns % 4):
                    await asyncio.sleep(0)
                if turns % 5:
                    reader.cancel()
                turns += 1
                with contextlib.suppress(asyncio.CancelledError):
                    seen.append((await reader).revision)
                await asyncio.sleep(0)
            await writer
        assert seen == revisions

    async def test_a_slow_reader_misses_nothing(self, store: Store):
        async with contextlib.aclosing(store.watch([Volume], 0)) as watch:
            first = await store.transact(Transaction(puts=[Put(volume())]))
            await take(watch, 1)
            rest = await asyncio.gather(
                *(store.transact(Transaction(puts=[Put(volume())])) for _ in range(1500))
            )
            seen = await take(watch, 1500)
            assert [c.revision for c in seen] == sorted(rest)
            assert seen[0].revision > first
            assert await is_silent(watch)

    async def test_readers_do_not_hinder_one_another(self, store: Store, watches):
        readers = [
            await watches.enter_async_context(contextlib.aclosing(store.watch([VM], 0)))
            for _ in range(10)
        ]
        tasks = [asyncio.create_task(take(watch, 40)) for watch in readers[:9]]
        revisions = await asyncio.gather(
            *(store.transact(Transaction(puts=[Put(vm())])) for _ in range(40))
        )
        await readers[4].aclose()
        seen = await asyncio.gather(*tasks, return_exceptions=True)
        late = await take(readers[9], 40)
        for outcome in [*seen[:4], *seen[5:], late]:
            assert isinstance(outcome, list)
            assert [c.revision for c in outcome] == sorted(revisions)

    async def test_an_idle_reader_of_a_quiet_kind_survives_compaction(self, store: Store):
        """Nothing happened to what it watches, so nothing can have been missed."""
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            reader = asyncio.create_task(take(watch, 1))
            await asyncio.sleep(0.01)
            for _ in range(20):
                await store.transact(Transaction(puts=[Put(volume())]))
            await store.compact(0)
            revision = await store.transact(Transaction(puts=[Put(vm())]))
            assert [c.revision for c in await reader] == [revision]

    async def test_aclose_ends_a_waiting_reader(self, store: Store):
        watch = store.watch([VM], 0)
        reader = asyncio.create_task(watch.__anext__())
        await asyncio.sleep(0.01)
        await watch.aclose()
        await watch.aclose()
        with pytest.raises(StopAsyncIteration):
            async with asyncio.timeout(GUARD):
                await reader
        with pytest.raises(StopAsyncIteration):
            await anext(watch)

    async def test_closing_the_store_ends_watches(self, store: Store):
        told = asyncio.Semaphore(0)

        async def count(watch: Watch) -> int:
            found = 0
            async for _ in watch:
                found += 1
                told.release()
            return found

        readers = [asyncio.create_task(count(store.watch([VM], 0))) for _ in range(3)]
        await store.transact(Transaction(puts=[Put(vm())]))
        async with asyncio.timeout(GUARD):
            for _ in readers:
                await told.acquire()
            await store.close()
            assert await asyncio.gather(*readers) == [1, 1, 1]

    async def test_history_outlives_a_restart(self, store: Store, harness: Harness):
        revisions = [await store.transact(Transaction(puts=[Put(vm())])) for _ in range(3)]
        await store.close()
        again = await harness.open()
        try:
            async with contextlib.aclosing(again.watch([VM], revisions[0])) as watch:
                assert [c.revision for c in await take(watch, 2)] == revisions[1:]
                revision = await again.transact(Transaction(puts=[Put(vm())]))
                assert [c.revision for c in await take(watch, 1)] == [revision]
        finally:
            await again.close()

    async def test_compacted_history(self, store: Store):
        revisions = [await store.transact(Transaction(puts=[Put(vm())])) for _ in range(10)]
        await store.compact(3)
        kept = revisions[-1] - 3
        async with contextlib.aclosing(store.watch([VM], kept)) as watch:
            assert [c.revision for c in await take(watch, 3)] == revisions[-3:]
        for gone in (0, kept - 1):
            async with contextlib.aclosing(store.watch([VM], gone)) as watch:
                with pytest.raises(CompactedError):
                    await take(watch, 1)
        assert len((await store.list(VM)).items) == 10

    async def test_compaction_overtakes_a_reader(self, store: Store):
        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            await store.transact(Transaction(puts=[Put(vm())]))
            await take(watch, 1)
            for _ in range(5):
                await store.transact(Transaction(puts=[Put(vm())]))
            await store.compact(1)
            with pytest.raises(CompactedError):
                await take(watch, 1)

    async def test_compaction_never_goes_back(self, store: Store):
        for _ in range(5):
            await store.transact(Transaction(puts=[Put(vm())]))
        await store.compact(1)
        await store.compact(5)
        with pytest.raises(CompactedError):
            await take(store.watch([VM], 1), 1)
        await store.compact(100)

    async def test_compacting_outlives_a_restart(self, store: Store, harness: Harness):
        for _ in range(5):
            await store.transact(Transaction(puts=[Put(vm())]))
        await store.compact(0)
        await store.close()
        again = await harness.open()
        try:
            with pytest.raises(CompactedError):
                await take(again.watch([VM], 4), 1)
            async with contextlib.aclosing(again.watch([VM], 5)) as watch:
                assert await is_silent(watch)
        finally:
            await again.close()

    async def test_a_revision_not_reached_yet(self, store: Store):
        """A client's cursor from a store that was replaced."""
        revision = await store.transact(Transaction(puts=[Put(vm())]))
        with pytest.raises(CompactedError):
            await take(store.watch([VM], revision + 1000), 1)

    async def test_what_is_seen_can_be_read(self, store: Store):
        """A reader finds in the store whatever it was told about."""

        async def follow(watch: Watch) -> None:
            for _ in range(40):
                changes = await anext(watch)
                for change in changes.changes:
                    found = await store.get(VM, change.id)
                    assert found is not None
                    assert found.revision >= changes.revision
                    assert await store.revision() >= changes.revision

        async with contextlib.aclosing(store.watch([VM], 0)) as watch:
            follower = asyncio.create_task(follow(watch))
            await asyncio.gather(
                *(store.transact(Transaction(puts=[Put(vm())])) for _ in range(40))
            )
            async with asyncio.timeout(GUARD):
                await follower

    async def test_list_then_watch_gives_the_present(self, store: Store):
        """The pattern of every controller, while others write."""
        ids = [vm().meta.id for _ in range(5)]
        last = vm(id=ids[0], cpus=1000)

        async def write(n: int) -> None:
            for round in range(20):
                id = ids[(n + round) % 5]
                if round % 4 == 3:
                    await store.transact(Transaction(deletes=[Delete(VM, id)]))
                else:
                    await store.transact(Transaction(puts=[Put(vm(id=id, cpus=n * 100 + round))]))

        async def follow() -> dict[str, object]:
            listing = await store.list(VM)
            state: dict[str, object] = {i.record.meta.id: i.record for i in listing.items}
            async with contextlib.aclosing(store.watch([VM], listing.revision)) as watch:
                seen = listing.revision
                while state.get(ids[0]) != last:
                    changes = await anext(watch)
                    assert changes.revision > seen
                    seen = changes.revision
                    for change in changes.changes:
                        if change.record is None:
                            state.pop(change.id)
                        else:
                            state[change.id] = change.record
            return state

        writers = [asyncio.create_task(write(n)) for n in range(4)]
        await asyncio.sleep(0.01)
        followers = [asyncio.create_task(follow()) for _ in range(3)]
        await asyncio.gather(*writers)
        await store.transact(Transaction(puts=[Put(last)]))
        listing = await store.list(VM)
        expected = {item.record.meta.id: item.record for item in listing.items}
        async with asyncio.timeout(GUARD):
            for state in await asyncio.gather(*followers):
                assert state == expected
