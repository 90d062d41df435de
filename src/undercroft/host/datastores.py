"""The datastores of this host: how files in them are reached, and how full they are."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import msgspec
import structlog

from undercroft.host.environment import Environment
from undercroft.model.base import Meta
from undercroft.model.datastore import (
    LOCAL,
    Datastore,
    DatastoreSpec,
    DatastoreState,
    DatastoreStatus,
    Fill,
    fill_of,
)
from undercroft.model.errors import DataError, UnavailableError
from undercroft.model.event import Event, EventLevel
from undercroft.model.layer import Layer
from undercroft.model.names import new_id
from undercroft.model.units import format_size
from undercroft.operations.context import new_event, scope
from undercroft.storage.datastores.directory import HALF, DirectoryDriver, sweep
from undercroft.storage.datastores.interface import Driver, Space
from undercroft.storage.reflink import can_reflink
from undercroft.store.interface import Check, Claim, Put, Transaction, Versioned

log = structlog.get_logger(__name__)

GRAIN = 1 << 20  # bytes: smaller changes of free space are not worth a write
_LEVELS = {Fill.WARNING: EventLevel.WARNING, Fill.CRITICAL: EventLevel.ERROR}
_ORDER = list(Fill)


async def driver(environment: Environment, id: str | None) -> Driver:
    """A datastore (by id) ready for use, None: the one in the data directory.

    Raises:
        DataError: its record is gone.
    """
    if id is None:
        return _local(environment)
    found = await environment.store.get(Datastore, id)
    if found is None:
        raise DataError(f"the record of datastore {id} is gone", object=f"datastore {id}")
    return driver_of(environment, found.record)


def driver_of(environment: Environment, datastore: Datastore) -> Driver:
    """The same by its record."""
    if datastore.spec.builtin:
        return _local(environment)
    path = Path(datastore.spec.path)
    return DirectoryDriver(path, path / HALF, datastore.meta.id, datastore.label)


def _local(environment: Environment) -> Driver:
    label = f"datastore {LOCAL}"
    return DirectoryDriver(environment.directory.volumes, environment.tmp, None, label)


def file_name(layer: Layer) -> str:
    """What the file of a layer is called in its datastore."""
    return f"{layer.meta.id}.{layer.spec.format.value}"


async def layer_file(environment: Environment, layer: Layer) -> Path:
    """The file of a layer, which may not be there.

    Raises:
        UnavailableError: its datastore is not there.
    """
    store = await driver(environment, layer.spec.datastore)
    await store.check()
    return store.path(file_name(layer))


async def open_datastores(environment: Environment) -> None:
    """At the start of a daemon: makes the record of the datastore in the data directory, if there
    is none yet, and sweeps out of the others what was being made when the last daemon ended."""
    store = environment.store
    found = (await store.list(Datastore)).items
    for item in found:
        spec, status = item.record.spec, item.record.status
        if not spec.builtin:
            await asyncio.to_thread(sweep, Path(spec.path), item.record.meta.id)
        if status.state is DatastoreState.REMOVING:  # what became of that nobody was told
            status = msgspec.structs.replace(status, state=DatastoreState.READY)
            record = msgspec.structs.replace(item.record, status=status)
            await store.transact(Transaction(puts=[Put(record)]))
    for name in await asyncio.to_thread(environment.keys.known):
        if not name.startswith("layer-"):  # of a disk that was being restored
            await asyncio.to_thread(environment.keys.remove, name)
    if any(item.record.spec.builtin for item in found):
        return
    path = environment.directory.volumes
    id = new_id("datastore")
    record = Datastore(
        meta=Meta(id=id, name=LOCAL, created=environment.clock()),
        spec=DatastoreSpec(host=environment.host, path=str(path), builtin=True, default=True),
        status=DatastoreStatus(reflink=await asyncio.to_thread(can_reflink, environment.tmp)),
    )
    await store.transact(
        Transaction(claims=[Claim(scope("datastore"), LOCAL, id)], puts=[Put(record)])
    )


async def note_usage(
    environment: Environment,
    found: Versioned[Datastore],
    used: Mapping[str, int],
    provisioned: Mapping[str, int],
) -> None:
    """Writes how full a datastore is, and tells of it when that passes a threshold or when the
    datastore goes or comes back. Bytes by the datastore's id."""
    datastore = found.record
    status = datastore.status
    if status.state is DatastoreState.REMOVING:
        return
    id = datastore.meta.id
    try:
        space = await driver_of(environment, datastore).space()
    except (UnavailableError, OSError) as error:
        message = error.message if isinstance(error, UnavailableError) else str(error)
        wanted = msgspec.structs.replace(status, state=DatastoreState.UNAVAILABLE, message=message)
    else:
        promised = provisioned.get(id, 0)
        fill = fill_of(datastore.spec, space.capacity, space.free, status.fill)
        wanted = msgspec.structs.replace(
            status,
            state=DatastoreState.READY,
            capacity=space.capacity // GRAIN * GRAIN,
            free=space.free // GRAIN * GRAIN,
            used=used.get(id, 0),
            provisioned=promised,
            fill=fill,
            message=None if fill is Fill.OK else _warning(datastore, space, promised),
        )
    if wanted == status or (_told(wanted) == _told(status) and _close(wanted, status)):
        return
    record = msgspec.structs.replace(datastore, status=wanted)
    await environment.store.transact(
        Transaction(
            checks=[Check(Datastore, id, found.revision)],
            puts=[Put(record), *map(Put, _events(environment, datastore, wanted))],
        )
    )


def _told(status: DatastoreStatus) -> tuple[object, ...]:
    return status.state, status.fill, status.used, status.provisioned, status.capacity


def _close(one: DatastoreStatus, other: DatastoreStatus) -> bool:
    return abs(one.free - other.free) < GRAIN


def _warning(datastore: Datastore, space: Space, promised: int) -> str:
    share = 1 - space.free / space.capacity if space.capacity else 0.0
    told = (
        f"{datastore.label} is {share:.0%} full: {format_size(space.free)} of "
        f"{format_size(space.capacity)} are left"
    )
    if promised > space.capacity:
        told += f", and guests were promised {promised / space.capacity:.1f} times the capacity"
    return told + "; guests stand still when nothing is left"


async def filling(environment: Environment) -> bool:
    """Whether any datastore has become fuller, or emptier, than what was written: a quick look."""
    for item in (await environment.store.list(Datastore)).items:
        datastore, status = item.record, item.record.status
        try:
            space = await driver_of(environment, datastore).space()
        except (UnavailableError, OSError):
            if status.state is DatastoreState.READY:
                return True
            continue
        fill = fill_of(datastore.spec, space.capacity, space.free, status.fill)
        if fill is not status.fill or status.state is DatastoreState.UNAVAILABLE:
            return True
    return False


def _events(environment: Environment, before: Datastore, status: DatastoreStatus) -> list[Event]:
    now, old = environment.clock(), before.status
    if status.state is not old.state:
        gone = status.state is DatastoreState.UNAVAILABLE
        return [
            new_event(
                now,
                "datastore.unavailable" if gone else "datastore.available",
                before,
                status.message or "" if gone else f"{before.label} is there again",
                level=EventLevel.ERROR if gone else EventLevel.INFO,
            )
        ]
    if _ORDER.index(status.fill) > _ORDER.index(old.fill):
        level = _LEVELS[status.fill]
        return [new_event(now, "datastore.filling", before, status.message or "", level=level)]
    return []
