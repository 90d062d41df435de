"""Image workers: made, failed, cancelled or cut off, and never removed under somebody."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.unit.host.rig import Rig
from tests.unit.operations.world import World
from undercroft.host import images as images_module
from undercroft.host import imaging, outcome
from undercroft.host import worker as worker_module
from undercroft.host.images import ImageWorker
from undercroft.host.imaging import MadeImage
from undercroft.host.outcome import TaskRun
from undercroft.model.errors import FetchError, NoSpaceError
from undercroft.model.event import Event
from undercroft.model.image import Image, ImageContent, ImageSourceKind, ImageState
from undercroft.model.requests import ImageCreate, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.store.interface import Transaction

DIGEST = "cd" * 32


class Workers:
    """All image workers, woken as records change; what `make_image` does is told to them."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.workers: dict[str, ImageWorker] = {}
        self.made = 0
        self.began, self.go = asyncio.Event(), asyncio.Event()
        self.go.set()
        self.failures: list[Exception] = []
        self.digest = DIGEST
        self._following: asyncio.Task[None] | None = None

    @property
    def world(self) -> World:
        return self.rig.world

    async def make(self, environment: Any, image: Image, run: TaskRun) -> MadeImage:
        self.began.set()
        await self.go.wait()
        if self.failures:
            raise self.failures.pop(0)
        self.made += 1
        directory = self.rig.environment.directory.image(self.digest)
        directory.mkdir(parents=True, exist_ok=True)
        return MadeImage(digest=self.digest, size=1, content=ImageContent(disk="disk.qcow2"))

    def begin(self) -> None:
        self._following = asyncio.create_task(self._follow())

    async def _follow(self) -> None:
        async for batch in self.rig.store.watch([Image, Task], 0):
            for change in batch.changes:
                record = change.record
                if isinstance(record, Image):
                    self.worker(record.meta.id).wake(record)
                elif isinstance(record, Task) and record.spec.cancel:
                    self.worker(record.spec.object.id).cancel_task(record.meta.id)

    def worker(self, id: str) -> ImageWorker:
        if id not in self.workers:
            self.workers[id] = ImageWorker(self.rig.environment, id)
        return self.workers[id]

    async def close(self) -> None:
        self.rig.environment.closing = True
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
        for worker in self.workers.values():
            await worker.close()
        self.workers.clear()
        self.rig.environment.closing = False

    def block(self) -> None:
        self.began.clear()
        self.go.clear()

    async def create(self, value: str = "tiny", **values: Any) -> Task:
        request = ImageCreate(source=ImageSourceKind.BUILD, value=value, **values)
        return await self.world.operations.images.create(SYSTEM, request)

    async def image(self, ref: str = "tiny") -> Image:
        return (await self.world.operations.images.get(SYSTEM, ref)).record

    async def assert_nothing_left(self) -> None:
        assert await self.world.all(Image) == []
        assert await self.rig.store.resolve(scope("image"), "tiny") is None
        assert not self.rig.environment.directory.image(DIGEST).exists()
        for task in await self.world.all(Task):
            assert task.status.state.final


@pytest.fixture
async def workers(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Workers]:
    made = Workers(rig)
    monkeypatch.setattr(images_module, "make_image", made.make)
    monkeypatch.setattr(worker_module, "RETRY_INTERVAL", 0.01)
    made.begin()
    yield made
    await made.close()


async def test_made(workers: Workers) -> None:
    task = await workers.rig.final(await workers.create())
    assert task.status.state is TaskState.SUCCEEDED
    assert task.status.result["digest"] == DIGEST
    image = await workers.image()
    assert (image.status.state, image.status.digest, image.tasks) == ("ready", DIGEST, ())
    assert [e.type for e in await workers.world.all(Event)].count("image.ready") == 1


@pytest.mark.parametrize("failure", [FetchError("no network"), ValueError("odd")])
async def test_what_fails_leaves_nothing(workers: Workers, failure: Exception) -> None:
    workers.failures = [failure]
    task = await workers.rig.final(await workers.create())
    assert task.status.state is TaskState.FAILED
    assert task.status.error is not None
    assert task.status.error.code == ("fetch" if isinstance(failure, FetchError) else "internal")
    await workers.assert_nothing_left()


async def test_cancelled(workers: Workers) -> None:
    workers.block()
    task = await workers.create()
    await workers.began.wait()
    await workers.world.operations.tasks.cancel(SYSTEM, task.meta.id)
    assert (await workers.rig.final(task)).status.state is TaskState.CANCELLED
    await workers.assert_nothing_left()


async def test_removed_by_force_while_it_is_made(workers: Workers) -> None:
    workers.block()
    create = await workers.create()
    await workers.began.wait()
    remove = await workers.world.operations.images.remove(SYSTEM, "tiny", force=True)
    assert (await workers.rig.final(create)).status.state is TaskState.CANCELLED
    assert (await workers.rig.final(remove)).status.state is TaskState.SUCCEEDED
    await workers.assert_nothing_left()


async def test_a_removal_that_came_too_late_to_cancel(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made and then removed; in between nobody can make a VM from it."""
    states = set()
    task = await workers.create()
    worker = workers.worker(task.spec.object.id)
    monkeypatch.setattr(worker, "cancel_task", lambda id: None)
    remove = await workers.world.operations.images.remove(SYSTEM, "tiny", force=True)
    while not (await workers.world.task(remove.meta.id)).status.state.final:
        states |= {image.status.state for image in await workers.world.all(Image)}
        await asyncio.sleep(0)
    assert ImageState.READY not in states
    await workers.assert_nothing_left()


async def test_a_request_to_cancel_that_comes_while_the_outcome_is_written(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The image is there and its task has succeeded: it must not be removed then."""
    task = await workers.create()
    transact = workers.rig.store.transact

    async def slow(transaction: Transaction) -> int:
        revision = await transact(transaction)
        if any(
            isinstance(put.record, Image) and put.record.status.state is ImageState.READY
            for put in transaction.puts
        ):
            workers.worker(task.spec.object.id).cancel_task(task.meta.id)
            await asyncio.sleep(0.01)
        return revision

    monkeypatch.setattr(workers.rig.store, "transact", slow)
    assert (await workers.rig.final(task)).status.state is TaskState.SUCCEEDED
    await asyncio.sleep(0.03)
    assert (await workers.image()).status.state is ImageState.READY
    assert workers.rig.environment.directory.image(DIGEST).exists()


async def test_cut_off_by_the_end_of_the_daemon(workers: Workers) -> None:
    workers.block()
    task = await workers.create()
    await workers.began.wait()
    await workers.close()
    assert not (await workers.world.task(task.meta.id)).status.state.final
    workers.go.set()
    workers.begin()
    assert (await workers.rig.final(task)).status.state is TaskState.SUCCEEDED
    assert workers.made == 1


async def test_a_full_store_does_not_have_it_made_twice(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "RETRY_INTERVAL", 0.001)
    transact = workers.rig.store.transact
    refusals = iter([NoSpaceError("full")] * 5)

    async def full(transaction: Transaction) -> int:
        if workers.made:
            for refusal in refusals:
                raise refusal
        return await transact(transaction)

    monkeypatch.setattr(workers.rig.store, "transact", full)
    assert (await workers.rig.final(await workers.create())).status.state is TaskState.SUCCEEDED
    assert workers.made == 1


async def test_removing(workers: Workers) -> None:
    await workers.rig.final(await workers.create())
    task = await workers.world.operations.images.remove(SYSTEM, "tiny")
    assert (await workers.rig.final(task)).status.state is TaskState.SUCCEEDED
    await workers.assert_nothing_left()


async def test_an_image_that_a_vm_was_made_from_meanwhile_stays(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await workers.rig.final(await workers.create())
    world = workers.world
    listing = world.store.list
    hidden = True

    async def blind(kind: Any) -> Any:
        nonlocal hidden
        found = await listing(kind)
        if hidden and kind.kind == "vm":
            hidden = False
            await world.operations.vms.create(
                SYSTEM, VMCreate(name="a", image="tiny", disk=1 << 20)
            )
        return found

    monkeypatch.setattr(world.store, "list", blind)
    task = await world.operations.images.remove(SYSTEM, "tiny")
    done = await workers.rig.final(task)
    assert done.status.error is not None
    assert done.status.error.code == "in-use"
    assert (await workers.image()).status.state is ImageState.READY
    assert workers.rig.environment.directory.image(DIGEST).exists()


async def test_content_that_two_images_share_goes_with_the_last(workers: Workers) -> None:
    await workers.rig.final(await workers.create())
    await workers.rig.final(await workers.create(name="same"))
    images = workers.world.operations.images
    directory = workers.rig.environment.directory.image(DIGEST)
    await workers.rig.final(await images.remove(SYSTEM, "tiny"))
    assert directory.exists()
    await workers.rig.final(await images.remove(SYSTEM, "same"))
    assert not directory.exists()


async def test_content_that_goes_while_another_image_of_it_is_made(
    workers: Workers, monkeypatch: pytest.MonkeyPatch
) -> None:
    await workers.rig.final(await workers.create())
    remove_image = imaging.remove_image

    async def slowly(environment: Any, image: Image) -> None:
        await remove_image(environment, image)
        workers.go.set()
        await asyncio.sleep(0.02)

    monkeypatch.setattr(images_module, "remove_image", slowly)
    workers.block()
    made = workers.make

    async def make(environment: Any, image: Image, run: TaskRun) -> MadeImage:
        if workers.made == 1:  # finds the content there, and waits before it says so
            workers.made += 1
            workers.began.set()
            await workers.go.wait()
            return MadeImage(digest=DIGEST, size=1, content=ImageContent(disk="disk.qcow2"))
        return await made(environment, image, run)

    monkeypatch.setattr(images_module, "make_image", make)
    second = await workers.create(name="same")
    await workers.began.wait()
    await workers.rig.final(await workers.world.operations.images.remove(SYSTEM, "tiny"))
    assert (await workers.rig.final(second)).status.state is TaskState.SUCCEEDED
    assert workers.rig.environment.directory.image(DIGEST).exists()


async def test_a_task_that_is_gone_is_dropped(workers: Workers) -> None:
    import msgspec

    from undercroft.store.interface import update

    await workers.rig.final(await workers.create())
    image = await workers.image()
    await update(
        workers.rig.store,
        Image,
        image.meta.id,
        lambda i: msgspec.structs.replace(i, tasks=("task-0000000000000000",)),
    )
    async with asyncio.timeout(10):
        while (await workers.image()).tasks:
            await asyncio.sleep(0.002)
    assert (await workers.image()).status.state is ImageState.READY
