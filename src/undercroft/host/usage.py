"""What volumes take on the host, and how full their datastores are."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from undercroft.host.datastores import driver_of, file_name, note_usage
from undercroft.host.environment import Environment
from undercroft.host.layers import Uses, volume_status
from undercroft.model.datastore import Datastore
from undercroft.model.errors import StaleError, UnavailableError
from undercroft.model.volume import Volume
from undercroft.storage.files import allocated
from undercroft.store.interface import update

FRESH = 1.0  # seconds for which a measurement is good enough


async def measure(environment: Environment, *, now: bool = False) -> Mapping[str, int]:
    """Bytes that the file of each layer takes, by id. What its volumes take is written into their
    status where it has changed, and how full datastores are. ``now``: as of now."""
    async with environment.usage.lock:
        uses = await Uses.read(environment)
        known = environment.usage.taken
        age = time.monotonic() - environment.usage.at
        if known is not None and not now and age < FRESH and known.keys() == uses.layers.keys():
            return known
        datastores = (await environment.store.list(Datastore)).items
        local = next((i.record.meta.id for i in datastores if i.record.spec.builtin), "")
        paths: dict[str, Path] = {}
        used: dict[str, int] = {}
        for found in datastores:
            drive = driver_of(environment, found.record)
            with contextlib.suppress(UnavailableError):
                await drive.check()
                for id, layer in uses.layers.items():
                    if (layer.spec.datastore or local) == found.record.meta.id:
                        paths[id] = drive.path(file_name(layer))
        # Where a datastore is away, what was known before is the best there is.
        taken = {id: (known or {}).get(id, 0) for id in uses.layers}
        taken |= await asyncio.to_thread(_measure, paths)
        for id, layer in uses.layers.items():
            place = layer.spec.datastore or local
            used[place] = used.get(place, 0) + taken[id]
        provisioned = await _volumes(environment, uses, taken, local)
        for found in datastores:
            with contextlib.suppress(StaleError):  # it is looked at again soon
                await note_usage(environment, found, used, provisioned)
        environment.usage.taken, environment.usage.at = taken, time.monotonic()
        return taken


async def _volumes(
    environment: Environment, uses: Uses, taken: Mapping[str, int], local: str
) -> dict[str, int]:
    """Writes what each volume takes; the bytes that guests see of all in each datastore."""
    provisioned: dict[str, int] = {}
    for item in (await environment.store.list(Volume)).items:
        volume = item.record
        head = uses.layers.get(volume.status.head)
        if head is None:
            continue
        place = head.spec.datastore or local
        provisioned[place] = provisioned.get(place, 0) + volume.spec.size
        own, shared = split(uses, volume.status.head, taken)
        change = partial(volume_status, allocated=own, shared=shared, datastore=place or None)
        if change(volume) != volume:
            await update(environment.store, Volume, volume.meta.id, change)
    return provisioned


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


def _measure(paths: Mapping[str, Path]) -> dict[str, int]:
    found = {}
    for id, path in paths.items():
        try:
            found[id] = allocated(path)
        except OSError:  # not there yet, or gone meanwhile
            found[id] = 0
    return found
