"""What is sent in pieces, and who needs it how long."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from tests.unit.host.rig import Rig
from tests.unit.storage.appliance import packages
from tests.unit.storage.appliance.packages import MiB
from undercroft.host import uploads
from undercroft.host.importing import examine, sweep_uploads
from undercroft.model.errors import (
    BusyError,
    HostileImageError,
    NotFoundError,
    StaleError,
    WrongStateError,
)
from undercroft.model.task import Task
from undercroft.model.transfer import ImportCreate, ImportSource
from undercroft.operations.access import SYSTEM
from undercroft.operations.services import Examined
from undercroft.store.interface import Put, Transaction

KEY = "0123456789abcdef"


async def pieces(*content: bytes, fail: bool = False) -> AsyncIterator[bytes]:
    for piece in content:
        await asyncio.sleep(0)
        yield piece
    if fail:
        raise ConnectionError


async def test_it_grows_at_its_end_only(rig: Rig) -> None:
    environment, content = rig.environment, os.urandom(3 * MiB)
    await uploads.append(environment, KEY, 0, pieces(content[:MiB], content[MiB : 2 * MiB]))
    with pytest.raises(WrongStateError) as caught:
        await uploads.append(environment, KEY, 5, pieces(b"x"))
    assert caught.value.data["size"] == 2 * MiB
    # What arrived before the connection broke stays.
    with pytest.raises(ConnectionError):
        await uploads.append(environment, KEY, 2 * MiB, pieces(content[2 * MiB : -9], fail=True))
    found = await uploads.status(environment, KEY)
    assert found.size == 3 * MiB - 9
    await uploads.append(environment, KEY, found.size, pieces(content[-9:]))
    assert uploads.upload_path(environment, KEY).read_bytes() == content
    assert (await uploads.remove(environment, KEY)).size == 3 * MiB
    assert (await uploads.status(environment, KEY)).size == 0


async def test_zeros_take_no_room(rig: Rig) -> None:
    content = b"begin" + bytes(20 * MiB)
    cut = [content[at : at + 65536] for at in range(0, len(content), 65536)]
    await uploads.append(rig.environment, KEY, 0, pieces(*cut))
    path = uploads.upload_path(rig.environment, KEY)
    assert path.read_bytes() == content
    assert path.stat().st_blocks * 512 < 4 * MiB


async def test_two_at_once(rig: Rig) -> None:
    async def slow() -> AsyncIterator[bytes]:
        yield b"first"
        with pytest.raises(BusyError):
            await uploads.append(rig.environment, KEY, 0, pieces(b"second"))
        yield b"!"

    await uploads.append(rig.environment, KEY, 0, slow())
    assert uploads.upload_path(rig.environment, KEY).read_bytes() == b"first!"


async def test_what_is_refused_goes_at_once(rig: Rig) -> None:
    environment, path = rig.environment, uploads.upload_path(rig.environment, KEY)
    data = packages.vmware(environment.tmp, (MiB,))
    await uploads.append(environment, KEY, 0, pieces(data))
    assert (await examine(environment, ImportSource(upload=KEY))).appliance.cpus == 4
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(HostileImageError):
        await examine(environment, ImportSource(upload=KEY))
    assert not path.exists()
    with pytest.raises(NotFoundError):
        await examine(environment, ImportSource(upload=KEY))


async def test_a_file_that_is_another_one_by_now(rig: Rig) -> None:
    path = rig.environment.tmp / "it.ova"
    path.write_bytes(packages.vmware(rig.environment.tmp, (MiB,)))
    status = path.stat()
    stamp = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    await examine(rig.environment, ImportSource(path=str(path), stamp=stamp))
    os.utime(path, ns=(0, 0))
    with pytest.raises(StaleError):
        await examine(rig.environment, ImportSource(path=str(path), stamp=stamp))
    with pytest.raises(NotFoundError):
        await examine(rig.environment, ImportSource(path=f"{path}x"))


async def test_old_ones_go_unless_an_import_needs_them(rig: Rig) -> None:
    environment, other = rig.environment, "fedcba9876543210"
    for key in (KEY, other):
        await uploads.append(environment, key, 0, pieces(b"x"))
        os.utime(uploads.upload_path(environment, key), (100, 100))
    rig.world.services.examined = Examined(rig.world.services.examined.appliance, None, "x86_64")
    task = await rig.world.operations.imports.create(SYSTEM, ImportCreate(upload=KEY))
    found = await environment.store.get(Task, task.meta.id)
    assert found is not None
    await environment.store.transact(Transaction(puts=[Put(task)]))  # as if it just began
    await sweep_uploads(environment, 50)
    assert (await uploads.status(environment, other)).size == 1
    await sweep_uploads(environment, 200)
    assert (await uploads.status(environment, other)).size == 0
    assert (await uploads.status(environment, KEY)).size == 1
