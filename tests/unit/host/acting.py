"""What tests of actors share: a VM that runs, calls that take their time, nothing left."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.unit.host.rig import FakeMachine, Rig
from tests.unit.operations.world import HOST
from undercroft.model.requests import StopRequest, VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.units import GiB
from undercroft.model.vm import VM, Forward
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope

FORCE = StopRequest(force=True)


async def ask_create(rig: Rig, **values: Any) -> Task:
    values.setdefault("name", "web1")
    values.setdefault("disk", GiB)
    values.setdefault("forwards", (Forward(guest_port=1, host_port=8080),))
    request = VMCreate(**values)
    return await rig.world.operations.vms.create(SYSTEM, request)


async def running(rig: Rig, **values: Any) -> FakeMachine:
    """A VM that runs."""
    task = await rig.final(await ask_create(rig, start=True, **values))
    assert task.status.state is TaskState.SUCCEEDED
    return rig.hypervisor.machine


def blocked(rig: Rig, name: str) -> tuple[asyncio.Event, asyncio.Event]:
    """Makes a call take until told; returns what says that it began, and what ends it."""
    began, go = asyncio.Event(), asyncio.Event()

    async def hook() -> None:
        began.set()
        await go.wait()

    rig.hypervisor.hooks[name] = hook
    return began, go


async def events(rig: Rig) -> list[str]:
    listing = await rig.world.operations.events.list(SYSTEM, limit=1000)
    return [item.record.type for item in listing.items]


async def assert_nothing_left(rig: Rig) -> None:
    assert await rig.world.all(VM) == []
    assert await rig.world.all(Volume) == []
    for where, name in (
        (scope("vm"), "web1"),
        (scope("volume"), "web1-boot"),
        (f"port/{HOST}", "tcp/8080"),
    ):
        assert await rig.store.resolve(where, name) is None
    data = rig.environment.data
    for directory in ("vms", "volumes", "run/vms"):
        assert not (data / directory).exists() or list((data / directory).iterdir()) == []
    for task in await rig.world.all(Task):
        assert task.status.state.final, f"{task.spec.verb} waits for ever"
