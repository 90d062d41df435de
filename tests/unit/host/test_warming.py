"""What warm templates may take, and which of them go first."""

from __future__ import annotations

import asyncio
import os

import pytest

from tests.unit.host.rig import Rig
from undercroft.host.warming import Room, Warmer
from undercroft.model.base import Meta
from undercroft.model.errors import InvalidError
from undercroft.model.names import new_id
from undercroft.model.requests import VMCreate
from undercroft.model.template import Template, TemplateSpec, TemplateState, TemplateStatus
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import VM, VMSpec
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.operations.warm import begin
from undercroft.store.interface import Claim, Put, Transaction


@pytest.mark.parametrize(
    ("text", "room"),
    [
        (None, Room()),
        ("", Room()),
        ("on", Room()),
        ("off", Room(count=0, pool=0)),
        ("0", Room(count=0, pool=0)),
        ("3", Room(count=3)),
        ("8G", Room(count=1000, disk=8 * GiB)),
    ],
)
def test_the_setting(text: str | None, room: Room) -> None:
    assert Room.read(text) == room


def test_a_setting_that_makes_no_sense() -> None:
    with pytest.raises(InvalidError):
        Room.read("plenty")


async def kept(rig: Rig, name: str, last_use: float, *, warm: str = "k", memory: int = MiB) -> None:
    """A template that was used last then."""
    id = new_id("template")
    template = Template(
        meta=Meta(id=id, name=name, created=1.0),
        spec=TemplateSpec(host="h", source="vm-x", memory=True, warm=warm),
        status=TemplateStatus(state=TemplateState.READY, memory=memory, shape=VMSpec(host="h")),
    )
    directory = rig.environment.template_directory(id)
    directory.mkdir(parents=True)
    os.utime(directory, (last_use, last_use))
    claim = Claim(scope("template"), name, id)
    await rig.store.transact(Transaction(puts=[Put(template)], claims=[claim]))


async def names(rig: Rig) -> list[str]:
    return sorted(item.record.meta.name for item in (await rig.store.list(Template)).items)


def warmer(rig: Rig, room: Room) -> Warmer:
    return Warmer(rig.environment, rig.world.context, lambda id: None, room)


async def test_the_least_recently_used_go_first(rig: Rig) -> None:
    for name, last in (("a", 30.0), ("b", 10.0), ("c", 20.0)):
        await kept(rig, name, last)
    await kept(rig, "mine", 1.0, warm="")
    await warmer(rig, Room(count=2)).shrink()
    assert await names(rig) == ["a", "c", "mine"]
    await warmer(rig, Room(count=2, disk=MiB)).shrink()
    assert await names(rig) == ["a", "mine"]
    await warmer(rig, Room(count=0)).shrink()
    assert await names(rig) == ["mine"], "what a user made is not touched"


async def test_a_full_disk_takes_them_all(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    await kept(rig, "a", 30.0)
    real = os.statvfs(rig.environment.data)
    full = os.statvfs_result((*real[:3], 1, 1, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    await warmer(rig, Room()).shrink()
    assert await names(rig) == []


async def test_what_a_killed_daemon_left_goes(rig: Rig) -> None:
    await rig.world.image("tiny", agent=True)
    await rig.world.operations.vms.create(SYSTEM, VMCreate(name="web1", image="tiny"))
    half = await begin(rig.world.context, await rig.world.vm("web1"), "k" * 16)
    running = asyncio.create_task(warmer(rig, Room()).run())
    try:
        async with asyncio.timeout(20):
            while True:
                found = await rig.store.get(VM, half.meta.id)
                if found is None or found.record.status.state == "removing":
                    break
                await asyncio.sleep(0.01)
    finally:
        running.cancel()
    (mine,) = (await rig.world.operations.vms.list(SYSTEM)).items
    assert mine.record.status.state != "removing"
