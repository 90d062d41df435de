"""VMs, snapshots and templates that go out as files."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import World
from undercroft.model.errors import ForbiddenError, InvalidError, NotFoundError, WrongStateError
from undercroft.model.export import Export, ExportFile, ExportState, ExportStatus
from undercroft.model.task import Task
from undercroft.model.template import Template
from undercroft.model.transfer import ExportCreate
from undercroft.model.units import GiB
from undercroft.model.vm import VMState
from undercroft.operations.access import SYSTEM, VIEW, Caller
from undercroft.operations.context import find
from undercroft.store.interface import Put, Transaction


async def asked(world: World, **values: Any) -> tuple[Export, Task]:
    """An export that nobody has begun to make, and its task."""
    request = msgspec.convert({"vm": "web1", **values}, ExportCreate)
    task = await world.operations.exports.create(SYSTEM, request)
    return (await find(world.store, Export, task.spec.object.id)).record, task


async def test_a_vm_is_frozen_first(world: World) -> None:
    await world.created("web1", disk=GiB)
    export, task = await asked(world, file="old", format="qcow2")
    assert (export.spec.source, export.spec.file, export.tasks) == (
        "vm web1",
        "old",
        (task.meta.id,),
    )
    template = (await find(world.store, Template, export.spec.template)).record
    assert template.spec.passing
    (freezing,) = (await world.vm("web1")).tasks  # in the VM's own queue
    assert task.spec.arguments["waits"] == freezing
    assert (await world.task(freezing)).spec.verb == "template.create"


@pytest.mark.parametrize(
    "values",
    [
        {"vm": None},
        {"template": "x"},
        {"vm": None, "template": "x", "snapshot": "s"},
        {"file": "../../etc/cron.d/x"},
        {"file": ""},
        {"disk": 1},  # an OVA holds all
        {"disk": 1, "format": "raw"},
        {"disk": -1, "format": "raw"},
        {"snapshot": "s", "quiesce": True},
    ],
)
async def test_requests_that_make_no_sense(world: World, values: dict[str, Any]) -> None:
    await world.created("web1", disk=GiB)
    with pytest.raises(InvalidError):
        await asked(world, **values)
    assert (await world.store.list(Export)).items == []


async def test_what_is_not_there_or_not_yet(world: World) -> None:
    with pytest.raises(NotFoundError):
        await asked(world)
    vm = await world.created("web1", disk=GiB)
    with pytest.raises(NotFoundError):
        await asked(world, snapshot="s1")
    await world.put("web1", VMState.CREATING, vm.spec.power)
    with pytest.raises(WrongStateError):
        await asked(world)


async def test_who_may(world: World) -> None:
    await world.created("web1", disk=GiB)
    eve = Caller("eve", VIEW)
    with pytest.raises(ForbiddenError):
        await world.operations.exports.create(eve, ExportCreate(vm="web1"))
    export, _ = await asked(world)
    with pytest.raises(ForbiddenError):
        await world.operations.exports.remove(eve, export.meta.id)
    nobody = Caller("nobody", frozenset())
    with pytest.raises(ForbiddenError):
        await world.operations.exports.content(nobody, export.meta.id, "x", 0, None)


async def test_its_files_are_there_when_it_is_ready(world: World) -> None:
    await world.created("web1", disk=GiB)
    export, task = await asked(world)
    with pytest.raises(WrongStateError):
        await world.operations.exports.content(SYSTEM, export.meta.id, "web1.ova", 0, None)
    file = ExportFile(name="web1.ova", size=5, sha256="ab", path="/x")
    status = ExportStatus(state=ExportState.READY, files=(file,))
    ready = msgspec.structs.replace(export, status=status, tasks=())
    await world.store.transact(Transaction(puts=[Put(ready)]))
    with pytest.raises(NotFoundError):
        await world.operations.exports.content(SYSTEM, export.meta.id, "../x", 0, None)
    await world.end(task.meta.id, msgspec.convert("succeeded", type(task.status.state)))
    await world.operations.exports.remove(SYSTEM, export.meta.id)
    with pytest.raises(NotFoundError):
        await world.operations.exports.get(SYSTEM, export.meta.id)


async def test_one_that_is_being_made_is_given_up_by_its_maker(world: World) -> None:
    await world.created("web1", disk=GiB)
    export, task = await asked(world)
    await world.operations.exports.remove(SYSTEM, export.meta.id)
    assert (await world.task(task.meta.id)).spec.cancel
    assert await world.store.get(Export, export.meta.id) is not None
