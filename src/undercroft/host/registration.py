"""This host's own record: made when the data directory is, kept true while the daemon runs."""

from __future__ import annotations

import asyncio
import re
import socket

import msgspec
import structlog

from undercroft.host.acceleration import HostAcceleration
from undercroft.host.datastores import filling
from undercroft.host.describe import describe
from undercroft.host.environment import Environment
from undercroft.host.usage import measure
from undercroft.hypervisor.firmware import find_firmware
from undercroft.model.base import Meta
from undercroft.model.datastore import Datastore
from undercroft.model.errors import UndercroftError
from undercroft.model.host import Host
from undercroft.model.names import new_id
from undercroft.model.vm import Machine
from undercroft.operations.context import scope
from undercroft.store.interface import Claim, Put, Store, Transaction, update

log = structlog.get_logger(__name__)

INTERVAL = 60.0  # seconds between two looks at what may change, such as free space
LOOKS = 12  # meanwhile: at how full datastores are


async def register(store: Store, now: float) -> str:
    """The id of this host's record, which is made if there is none yet."""
    listing = await store.list(Host)
    if listing.items:
        return listing.items[0].record.meta.id
    name = re.sub(r"[^a-z0-9.-]+", "-", socket.gethostname().lower()).strip("-.")[:63] or "host"
    host = Host(meta=Meta(id=new_id("host"), name=name, created=now))
    await store.transact(
        Transaction(claims=[Claim(scope("host"), name, host.meta.id)], puts=[Put(host)])
    )
    return host.meta.id


async def keep_described(environment: Environment, acceleration: HostAcceleration) -> None:
    """Writes the host's status again and again until cancelled."""
    started = environment.clock()
    while True:
        try:
            await measure(environment, now=True)
            await _write(environment, acceleration, started)
        except (UndercroftError, OSError) as error:
            log.warning("describing the host failed", error=str(error))
        for _ in range(LOOKS):  # a guest can fill much of a datastore in a minute
            await asyncio.sleep(INTERVAL / LOOKS)
            if await filling(environment):
                break


async def _write(environment: Environment, acceleration: HostAcceleration, started: float) -> None:
    emulators = await acceleration.emulators()
    native = next((e for e in emulators if e.arch == "x86_64"), None)
    status = await describe(
        environment.data,
        native or (emulators[0] if emulators else None),
        tuple(emulator.arch for emulator in emulators),
        await acceleration.statuses(),
        await asyncio.to_thread(_firmware),
        started,
    )
    messages = [
        item.record.status.message
        for item in (await environment.store.list(Datastore)).items
        if item.record.status.message
    ]
    status = msgspec.structs.replace(status, problems=(*status.problems, *messages))
    # Free space changes all the time: only whole gigabytes are worth a write.
    status = msgspec.structs.replace(status, disk_free=status.disk_free >> 30 << 30)
    await update(
        environment.store,
        Host,
        environment.host,
        lambda host: msgspec.structs.replace(host, status=status),
    )


def _firmware() -> tuple[str, ...]:
    found = ["bios"]
    for name, secure in (("uefi", False), ("uefi-secure", True)):
        try:
            find_firmware("x86_64", Machine.Q35, secure_boot=secure)
        except UndercroftError:
            continue
        found.append(name)
    return tuple(found)
