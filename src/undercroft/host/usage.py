"""What volumes take on the host."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from functools import partial

from undercroft.host.environment import Environment
from undercroft.host.layers import Uses, volume_status
from undercroft.model.volume import Volume
from undercroft.storage.files import allocated
from undercroft.store.interface import update

FRESH = 1.0  # seconds for which a measurement is good enough


async def measure(environment: Environment) -> Mapping[str, int]:
    """Bytes that the file of each layer takes, by id. What its volumes take is written into their
    status where it has changed."""
    async with environment.usage.lock:
        now = time.monotonic()
        uses = await Uses.read(environment)
        known = environment.usage.taken
        fresh = known is not None and now - environment.usage.at < FRESH
        if known is not None and fresh and known.keys() == uses.layers.keys():
            return known
        taken = await asyncio.to_thread(_measure, environment, list(uses.layers))
        for item in (await environment.store.list(Volume)).items:
            volume = item.record
            if not volume.status.head:
                continue
            own, shared = split(uses, volume.status.head, taken)
            if (own, shared) != (volume.status.allocated, volume.status.shared):
                change = partial(volume_status, allocated=own, shared=shared)
                await update(environment.store, Volume, volume.meta.id, change)
        environment.usage.taken, environment.usage.at = taken, now
        return taken


def split(uses: Uses, head: str, taken: Mapping[str, int]) -> tuple[int, int]:
    """What of a chain of layers only its head's volume needs, and what others need too; bytes."""
    own = shared = 0
    at: str | None = head
    alone = True
    while at is not None and at in uses.layers:
        above = len(uses.children.get(at, ()))
        if at == head:
            others = above > 0 or at in uses.frozen  # of a disk that is only read
        else:
            others = above > 1 or at in uses.heads or at in uses.frozen
        alone = alone and not others
        size = taken.get(at, 0)
        own, shared = (own + size, shared) if alone else (own, shared + size)
        at = uses.layers[at].spec.parent
    return own, shared


def _measure(environment: Environment, layers: Iterable[str]) -> dict[str, int]:
    found = {}
    for id in layers:
        try:
            found[id] = allocated(environment.layer_path(id))
        except OSError:
            continue  # not there yet, or gone meanwhile
    return found
