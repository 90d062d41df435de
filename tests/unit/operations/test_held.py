"""VMs held ready: who wants one like them takes over everything that they have."""

from __future__ import annotations

import msgspec
import pytest

from tests.unit.operations.test_warm import KEY, run, template_for
from tests.unit.operations.world import World
from undercroft.model.image import ImageDefaults
from undercroft.model.requests import CloneRequest
from undercroft.model.task import TaskState
from undercroft.model.template import Template, TemplateDisk
from undercroft.model.vm import VM, Forward, Guest, Port, Power, VMState
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.operations.held import POOL, prepare
from undercroft.operations.vm_change import discard
from undercroft.store.interface import Put, Transaction, update


@pytest.fixture
async def template(world: World) -> Template:
    """A template of a kind of VM that was run once."""
    defaults = ImageDefaults(user="debian")
    image = await world.image("debian:12", agent=True, cloud_init=True, defaults=defaults)
    cold = await run(world, name="web1")
    made = await template_for(world, cold)
    vm = await world.vm("web1")
    disk = TemplateDisk(layer="layer-x", size=1 << 30, image=image.meta.id, disk=vm.spec.disks[0])
    made = msgspec.structs.replace(made, status=msgspec.structs.replace(made.status, disks=(disk,)))
    await world.store.transact(Transaction(puts=[Put(made)]))
    return made


async def held(world: World, template: Template) -> VM:
    """One that its host has made ready."""
    vm = await prepare(world.context, template)
    assert vm is not None
    await world.end(vm.tasks[0], TaskState.SUCCEEDED)
    status = msgspec.structs.replace(vm.status, held=template.meta.id, uid=4711)
    vm = msgspec.structs.replace(vm, status=status, tasks=())
    await world.store.transact(Transaction(puts=[Put(vm)]))
    world.services.holding.setdefault(template.meta.id, []).append(vm.meta.id)
    return vm


async def test_it_is_nobodys(world: World, template: Template) -> None:
    vm = await prepare(world.context, template)
    assert vm is not None
    assert vm.spec.passing
    assert vm.spec.ports[0].forwards == ()
    listed = [item.record.meta.id for item in (await world.operations.vms.list(SYSTEM)).items]
    assert vm.meta.id not in listed
    volumes = [item.record.spec.vm for item in (await world.operations.volumes.list(SYSTEM)).items]
    assert vm.meta.id not in volumes
    tasks = [item.record.meta.id for item in (await world.operations.tasks.list(SYSTEM)).items]
    assert vm.tasks[0] not in tasks


async def test_a_run_takes_it_over(world: World, template: Template) -> None:
    waiting = await held(world, template)
    task = await run(
        world,
        name="web2",
        guest=Guest(ssh_keys=(KEY,)),
        forwards=(Forward(guest_port=80),),
        labels={"a": "b"},
    )
    vm = await world.vm("web2")
    assert vm.meta.id == waiting.meta.id
    assert (vm.meta.name, vm.meta.labels) == ("web2", {"a": "b"})
    assert vm.spec.guest.ssh_keys == (KEY,)
    assert not vm.spec.passing
    assert vm.spec.power is Power.RUNNING
    assert vm.spec.disks == waiting.spec.disks
    assert vm.spec.ports[0].mac == waiting.spec.ports[0].mac
    assert [f.guest_port for f in vm.spec.ports[0].forwards] == [80]
    assert (vm.status.uid, vm.status.held, vm.status.state) == (4711, None, VMState.CREATING)
    assert task.spec.arguments["macs"] == {"52:54:00:00:00:01": vm.spec.ports[0].mac}
    assert await world.store.resolve(scope("vm"), waiting.meta.name) is None
    volume = await world.store.get(Volume, vm.spec.disks[0].volume)
    assert volume is not None
    assert volume.record.meta.name == "web2-boot"
    await world.check_invariants()


async def test_nobody_gets_one_that_another_has(world: World, template: Template) -> None:
    first = await held(world, template)
    second = await held(world, template)
    names = ("b1", "b2", "b3")
    await world.operations.templates.clone(SYSTEM, template.meta.name, CloneRequest(names=names))
    ids = [(await world.vm(name)).meta.id for name in names]
    assert ids[:2] == [first.meta.id, second.meta.id]
    assert len(set(ids)) == 3
    await world.check_invariants()


@pytest.mark.parametrize("why", ["not ready", "busy", "ended", "own address", "another template"])
async def test_it_is_left_alone(world: World, template: Template, why: str) -> None:
    waiting = await held(world, template)
    values: dict[str, object] = {}
    if why == "own address":
        values["ports"] = (Port(mac="52:54:00:00:00:77"),)

    def change(vm: VM) -> VM:
        if why == "busy":
            return msgspec.structs.replace(vm, tasks=("task-x",))
        ways: dict[str, dict[str, object]] = {
            "not ready": {"held": None},
            "ended": {"state": VMState.STOPPED},
            "another template": {"held": "tpl-y"},
        }
        changes = ways.get(why, {})
        return msgspec.structs.replace(vm, status=msgspec.structs.replace(vm.status, **changes))

    await update(world.store, VM, waiting.meta.id, change)
    await run(world, name="web2", **values)
    assert (await world.vm("web2")).meta.id != waiting.meta.id


async def test_a_template_that_is_gone(world: World, template: Template) -> None:
    await world.operations.templates.remove(SYSTEM, template.meta.id)
    assert await prepare(world.context, template) is None


async def test_a_clone_that_is_to_be_encrypted_is_not_one_that_is_not(
    world: World, template: Template
) -> None:
    waiting = await held(world, template)
    request = CloneRequest(names=("b1", "b2"), encrypted=True)
    await world.operations.templates.clone(SYSTEM, template.meta.name, request)
    for name in request.names:
        vm = await world.vm(name)
        assert vm.meta.id != waiting.meta.id
        volume = await world.store.get(Volume, vm.spec.disks[0].volume)
        assert volume is not None
        assert volume.record.spec.encrypted


async def test_one_that_was_taken_over_is_not_removed(world: World, template: Template) -> None:
    """Who holds it ready wants it gone just when somebody takes it."""
    waiting = await held(world, template)
    await run(world, name="web2", guest=Guest(ssh_keys=(KEY,)))
    await discard(world.context, POOL, waiting.meta.id)
    vm = await world.vm("web2")
    assert vm.meta.id == waiting.meta.id
    assert vm.status.state is VMState.CREATING
    await world.check_invariants()


async def test_one_that_nobody_took_goes(world: World, template: Template) -> None:
    waiting = await held(world, template)
    await discard(world.context, POOL, waiting.meta.id)
    found = await world.store.get(VM, waiting.meta.id)
    assert found is not None
    assert found.record.status.state is VMState.REMOVING
    await discard(world.context, POOL, "vm-0000000000000000")  # nothing to do
