"""Which new VMs go on from a warm template, and which must boot."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import HOST, World
from undercroft.model.base import Meta
from undercroft.model.image import ImageDefaults
from undercroft.model.names import new_id
from undercroft.model.requests import VMCreate
from undercroft.model.task import Task
from undercroft.model.template import (
    Template,
    TemplateSpec,
    TemplateState,
    TemplateStatus,
)
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import VM, Display, Forward, Guest, Port, PortMode
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.operations.vm_change import removal_releases
from undercroft.operations.warm import begin, find_warm, keep
from undercroft.store.interface import Claim, Delete, Put, Transaction

KEY = f"ssh-ed25519 {'A' * 68} somebody@somewhere"


async def run(world: World, **values: Any) -> Task:
    request = VMCreate(image="debian:12", start=True)
    return await world.operations.vms.create(SYSTEM, msgspec.structs.replace(request, **values))


async def key(world: World, **values: Any) -> object:
    return (await run(world, **values)).spec.arguments.get("warm")


@pytest.fixture
async def image(world: World) -> str:
    defaults = ImageDefaults(user="debian")
    made = await world.image("debian:12", agent=True, cloud_init=True, defaults=defaults)
    return made.meta.id


async def template_for(world: World, task: Task) -> Template:
    """A warm template that VMs like that of the task go on from."""
    vm = await world.vm(task.spec.object.id)
    shape = msgspec.structs.replace(vm.spec, ports=(Port(mac="52:54:00:00:00:01"),))
    id = new_id("template")
    template = Template(
        meta=Meta(id=id, name="debian:12-warm-1", created=1.0),
        spec=TemplateSpec(
            host=HOST, source="vm-x", memory=True, warm=str(task.spec.arguments["warm"])
        ),
        status=TemplateStatus(state=TemplateState.READY, shape=shape, memory=1),
    )
    claim = Claim(scope("template"), template.meta.name, id)
    await world.store.transact(Transaction(puts=[Put(template)], claims=[claim]))
    return template


async def test_what_is_only_ones_own_makes_no_difference(world: World, image: str) -> None:
    first = await key(world, name="web1")
    assert isinstance(first, str)
    own: dict[str, Any] = {
        "guest": Guest(hostname="www", ssh_keys=(KEY,)),
        "labels": {"a": "b"},
        "forwards": (Forward(guest_port=80),),
        "stop_timeout": 5.0,
    }
    for name, value in own.items():
        assert await key(world, **{name: value}) == first, name


async def test_another_shape_is_another_key(world: World, image: str) -> None:
    others: list[dict[str, Any]] = [
        {},
        {"cpus": 2},
        {"memory": GiB},
        {"disk": 5 * GiB},
        {"display": Display.NONE},
        {"ports": (Port(mode=PortMode.RESTRICTED),)},
        {"ports": ()},
        {"cpu_model": "qemu64"},
    ]
    keys = [await key(world, **values) for values in others]
    assert None not in keys
    assert len(set(keys)) == len(keys)


async def test_what_must_boot(world: World, image: str) -> None:
    refused: list[dict[str, Any]] = [
        {"cold": True},
        {"start": False},
        {"tpm": True},
        {"encrypt": True},  # its memory would be kept in the clear
        {"guest": Guest(password_hash="$6$salt$" + "x" * 40)},
        {"guest": Guest(user_data="#cloud-config")},
        {"guest": Guest(user="somebody")},
        {"guest": Guest(ssh_keys=(KEY,) * 200)},
    ]
    for values in refused:
        assert await key(world, **values) is None, values
    await world.image("deaf", agent=False)
    assert await key(world, image="deaf") is None


async def test_it_goes_on_from_the_template_of_its_key(world: World, image: str) -> None:
    cold = await run(world, name="web1")
    assert "template" not in cold.spec.arguments
    template = await template_for(world, cold)
    task = await run(world, name="web2", guest=Guest(ssh_keys=(KEY,)))
    vm = await world.vm("web2")
    assert task.spec.arguments["template"] == template.meta.id
    assert task.spec.arguments["mode"] == "instant"
    assert task.spec.arguments["macs"] == {"52:54:00:00:00:01": vm.spec.ports[0].mac}
    assert "template" not in (await run(world, memory=GiB)).spec.arguments
    assert "template" not in (await run(world, cold=True)).spec.arguments
    await world.check_invariants()


async def test_an_image_takes_its_warm_templates_with_it(world: World, image: str) -> None:
    task = await run(world, name="web1")
    await template_for(world, task)
    await world.end(task.meta.id, task.status.state.SUCCEEDED)
    vm = await world.vm("web1")
    volume = (await world.all(Volume))[0]
    await world.store.transact(
        Transaction(
            deletes=[Delete(VM, vm.meta.id), Delete(Volume, volume.meta.id)],
            releases=removal_releases(vm, [volume]),
        )
    )
    await world.operations.images.remove(SYSTEM, "debian:12")
    assert await world.all(Template) == []
    assert await world.store.resolve(scope("template"), "debian:12-warm-1") is None


async def test_nobodys_vm_is_like_the_first_but_has_nothing_of_its_owner(
    world: World, image: str
) -> None:
    await run(
        world,
        name="web1",
        memory=256 * MiB,
        guest=Guest(ssh_keys=(KEY,), hostname="secret"),
        forwards=(Forward(guest_port=80),),
        labels={"a": "b"},
    )
    source = await world.vm("web1")
    vm = await begin(world.context, source, "k" * 16)
    assert vm.spec.passing
    assert vm.spec.guest == Guest(user="debian")
    assert (vm.spec.memory, vm.spec.image, vm.meta.labels) == (256 * MiB, image, {})
    (port,) = vm.spec.ports
    assert port.forwards == ()
    assert port.mac != source.spec.ports[0].mac
    assert vm.spec.disks[0].volume != source.spec.disks[0].volume
    # Users are not shown it.
    listed = (await world.operations.vms.list(SYSTEM)).items
    assert [item.record.meta.name for item in listed] == ["web1"]
    found = await world.store.get(VM, vm.meta.id)
    assert found is not None
    template, task = await keep(world.context, found, "debian:12", "k" * 16)
    assert task.spec.arguments["template"] == template.meta.id
    assert await find_warm(world.context, "k" * 16) is None, "it is not ready"
