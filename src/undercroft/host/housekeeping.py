"""What must not grow without end: finished tasks, events, history."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from undercroft.host.environment import Environment
from undercroft.host.exports import sweep_exports
from undercroft.host.fetching import downloads
from undercroft.host.forgetting import collect_snapshots
from undercroft.host.importing import sweep_uploads
from undercroft.host.templates import collect_templates
from undercroft.host.volume_clone import collect_clones
from undercroft.model.errors import UndercroftError
from undercroft.model.event import Event
from undercroft.model.task import Task
from undercroft.storage.fetch import sweep_downloads
from undercroft.store.interface import Delete, Transaction

log = structlog.get_logger(__name__)

INTERVAL = 300.0  # seconds
KEEP_TASKS = 1_000
KEEP_EVENTS = 10_000
KEEP_REVISIONS = 20_000
KEEP_EXPORTS = 86400.0  # seconds that an export waits to be fetched
KEEP_UPLOADS = 86400.0  # seconds that what was sent waits to go on, or to be imported
KEEP_DOWNLOADS = 7 * 86400.0  # seconds that the part of a file waits for its download to go on
BATCH = 500


async def keep_house(environment: Environment, shrink: Callable[[], Awaitable[None]]) -> None:
    """Tidies up again and again until cancelled; ``shrink`` gives back what can be spared."""
    while True:
        try:
            await tidy(environment)
            await shrink()
        except (UndercroftError, OSError) as error:
            log.warning("tidying failed", error=str(error))
        await asyncio.sleep(INTERVAL)


async def tidy(environment: Environment) -> None:
    """Forgets the oldest finished tasks and events beyond the numbers kept, and old downloads."""
    store = environment.store
    tasks = [t for t in (await store.list(Task)).items if t.record.status.state.final]
    tasks.sort(key=lambda item: item.revision, reverse=True)
    events = sorted((await store.list(Event)).items, key=lambda item: item.revision, reverse=True)
    old = [Delete(Task, item.record.meta.id) for item in tasks[KEEP_TASKS:]]
    old += [Delete(Event, item.record.meta.id) for item in events[KEEP_EVENTS:]]
    for start in range(0, len(old), BATCH):
        await store.transact(Transaction(deletes=old[start : start + BATCH]))
    await store.compact(KEEP_REVISIONS)
    await collect_snapshots(environment)
    await collect_templates(environment)
    await collect_clones(environment)
    await sweep_exports(environment, environment.clock() - KEEP_EXPORTS)
    await sweep_uploads(environment, environment.clock() - KEEP_UPLOADS)
    since = environment.clock() - KEEP_DOWNLOADS
    await asyncio.to_thread(sweep_downloads, downloads(environment), since)
