"""What must not grow without end, and what must not be forgotten."""

from __future__ import annotations

import pytest

from tests.unit.host.rig import Rig
from undercroft.host import housekeeping
from undercroft.host.housekeeping import tidy
from undercroft.model.errors import CompactedError
from undercroft.model.event import Event
from undercroft.model.task import Task, TaskState
from undercroft.model.vm import VM
from undercroft.operations.context import new_event, new_task
from undercroft.store.interface import Put, Transaction


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("KEEP_TASKS", 5),
        ("KEEP_EVENTS", 7),
        ("KEEP_REVISIONS", 10),
        ("BATCH", 3),
    ):
        monkeypatch.setattr(housekeeping, name, value)


async def fill(rig: Rig) -> tuple[list[str], list[str], list[str]]:
    """Finished and unfinished tasks and events, oldest first."""
    await rig.close()
    await rig.world.created("web1")
    vm = await rig.world.vm("web1")
    finished, waiting, events = [], [], []
    for n in range(20):
        task = new_task(rig.world.context, "vm.start", vm, "me")
        event = new_event(float(n), "vm.started", vm, "x")
        await rig.store.transact(Transaction(puts=[Put(task), Put(event)]))
        events.append(event.meta.id)
        if n % 4 == 0:
            waiting.append(task.meta.id)
        else:
            await rig.world.end(task.meta.id, TaskState.SUCCEEDED)
            finished.append(task.meta.id)
    return finished, waiting, events


@pytest.mark.usefixtures("small")
async def test_the_oldest_go_and_the_unfinished_stay(rig: Rig) -> None:
    finished, waiting, events = await fill(rig)
    await tidy(rig.environment)
    kept = {task.meta.id for task in await rig.world.all(Task)}
    assert kept == set(waiting) | set(finished[-5:])
    assert {event.meta.id for event in await rig.world.all(Event)} == set(events[-7:])
    assert len(await rig.world.all(VM)) == 1
    revision = await rig.store.revision()
    await tidy(rig.environment)
    assert {task.meta.id for task in await rig.world.all(Task)} == kept
    assert await rig.store.revision() == revision


@pytest.mark.usefixtures("small")
async def test_history_is_bounded(rig: Rig) -> None:
    await fill(rig)
    await tidy(rig.environment)
    watch = rig.store.watch([VM], 1)
    with pytest.raises(CompactedError):
        await watch.__anext__()
    await watch.aclose()


async def test_little_is_left_alone(rig: Rig) -> None:
    finished, waiting, events = await fill(rig)
    await tidy(rig.environment)
    kept = {task.meta.id for task in await rig.world.all(Task)}
    assert kept >= set(finished) | set(waiting)
    assert {event.meta.id for event in await rig.world.all(Event)} >= set(events)
