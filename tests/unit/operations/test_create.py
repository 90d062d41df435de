"""Creating VMs: what comes from where, what is refused, and that a refusal leaves nothing."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import HOST, World
from undercroft.model.errors import (
    AlreadyExistsError,
    InvalidError,
    NotFoundError,
    UndercroftError,
    UnsupportedError,
    WrongStateError,
)
from undercroft.model.event import Event
from undercroft.model.image import Image, ImageDefaults, ImageState
from undercroft.model.names import is_id
from undercroft.model.requests import VMCreate
from undercroft.model.task import Task, TaskState
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import (
    VM,
    Display,
    Firmware,
    Forward,
    Guest,
    Machine,
    Port,
    Power,
    Protocol,
    VMState,
)
from undercroft.model.volume import Volume
from undercroft.operations import vm_create
from undercroft.operations.access import SYSTEM
from undercroft.operations.context import scope
from undercroft.store.interface import Claim, Delete, Put, Store, Transaction, update


async def create(world: World, **values: Any) -> Task:
    return await world.operations.vms.create(SYSTEM, VMCreate(**values))


async def nothing_but(world: World, *images: Image) -> None:
    for kind in (VM, Volume, Task, Event):
        assert await world.all(kind) == []
    assert [i.meta.id for i in await world.all(Image)] == sorted(i.meta.id for i in images)


async def test_one_transaction_writes_all_of_it(world: World) -> None:
    before = await world.store.revision()
    task = await create(world, name="web1", disk=GiB, labels={"env": "prod"}, start=True)
    assert await world.store.revision() == before + 1
    vm = await world.vm("web1")
    assert vm.tasks == (task.meta.id,)
    assert vm.status.state is VMState.CREATING
    assert vm.spec.power is Power.RUNNING
    assert vm.meta.labels == {"env": "prod"}
    assert task.spec.verb == "vm.create"
    assert task.spec.arguments == {"start": True}
    assert (task.spec.object.id, task.spec.object.name) == (vm.meta.id, "web1")
    assert (await world.task(task.meta.id)).status.state is TaskState.PENDING
    (volume,) = await world.all(Volume)
    assert volume.meta.name == "web1-boot"
    assert volume.spec.size == GiB
    assert vm.spec.disks[0].volume == volume.meta.id
    (event,) = await world.all(Event)
    assert event.type == "vm.created"
    assert event.by == "system"
    await world.check_invariants()


async def test_without_an_image_there_is_what_the_model_says(world: World) -> None:
    await create(world, name="bare")
    spec = (await world.vm("bare")).spec
    assert (spec.cpus, spec.memory, spec.machine) == (1, 512 * MiB, Machine.Q35)
    assert (spec.firmware, spec.display, spec.disks) == (Firmware.BIOS, Display.STD, ())
    assert spec.power is Power.STOPPED
    (port,) = spec.ports
    assert port.mac
    assert port.forwards == ()


async def test_the_image_says_what_its_user_does_not(world: World) -> None:
    defaults = ImageDefaults(cpus=2, memory=GiB, machine="q35", firmware="uefi", user="debian")
    image = await world.image("debian:12", defaults=defaults, cloud_init=True, ssh=True)
    await create(world, name="a", image="debian:12")
    spec = (await world.vm("a")).spec
    assert (spec.cpus, spec.memory, spec.firmware) == (2, GiB, Firmware.UEFI)
    assert spec.image == image.meta.id
    assert spec.guest.user == "debian"
    (forward,) = spec.ports[0].forwards
    assert forward.guest_port == 22
    assert forward.host_port in vm_create.HOST_PORTS
    (volume,) = await world.all(Volume)
    assert (volume.spec.size, volume.spec.image) == (1 << 30, image.meta.id)


async def test_the_user_has_the_last_word(world: World) -> None:
    await world.image("debian:12", cloud_init=True, ssh=True)
    await create(
        world,
        name="a",
        image="debian:12",
        cpus=3,
        memory=256 * MiB,
        disk=4 * GiB,
        firmware=Firmware.UEFI,
        display=Display.NONE,
        ports=(Port(mac="52:54:00:AA:BB:CC"),),
        forwards=(Forward(guest_port=22, host_port=2222),),
        guest=Guest(user="me"),
    )
    spec = (await world.vm("a")).spec
    assert (spec.cpus, spec.memory, spec.firmware) == (3, 256 * MiB, Firmware.UEFI)
    assert spec.display is Display.NONE
    assert spec.guest.user == "me"
    assert spec.ports[0].mac == "52:54:00:aa:bb:cc"
    assert [f.host_port for f in spec.ports[0].forwards] == [2222]
    (volume,) = await world.all(Volume)
    assert volume.spec.size == 4 * GiB


async def test_zero_is_not_taken_for_unsaid(world: World) -> None:
    await world.image("debian:12", defaults=ImageDefaults(cpus=2))
    for values in ({"cpus": 0}, {"memory": 0}, {"disk": 0}):
        with pytest.raises(InvalidError):
            await create(world, name="a", image="debian:12", **values)


async def test_a_kernel_image_boots_its_kernel_without_a_disk(world: World) -> None:
    defaults = ImageDefaults(machine="microvm", firmware="kernel")
    await world.image("tiny", defaults=defaults, disk=None, virtual_size=0, kernel="kernel")
    await create(world, name="a", image="tiny", kernel_arguments="quiet")
    spec = (await world.vm("a")).spec
    assert (spec.machine, spec.firmware) == (Machine.MICROVM, Firmware.KERNEL)
    assert (spec.display, spec.disks, spec.kernel_arguments) == (Display.NONE, (), "quiet")
    with pytest.raises(InvalidError, match="no disk to boot from"):
        await create(world, name="b", image="tiny", machine=Machine.Q35, firmware=Firmware.BIOS)


async def test_an_image_says_what_display_it_needs(world: World) -> None:
    await world.image("bare", defaults=ImageDefaults(display="none"))
    await create(world, name="a", image="bare")
    assert (await world.vm("a")).spec.display is Display.NONE
    await create(world, name="b", image="bare", display=Display.STD)
    assert (await world.vm("b")).spec.display is Display.STD


async def test_no_network_when_none_is_wanted(world: World) -> None:
    await world.image("debian:12", ssh=True)
    await create(world, name="a", image="debian:12", ports=())
    assert (await world.vm("a")).spec.ports == ()
    with pytest.raises(InvalidError, match="without a network adapter"):
        await create(world, name="b", ports=(), forwards=(Forward(guest_port=80),))


REFUSED: list[tuple[dict[str, Any], type[UndercroftError]]] = [
    ({"name": "Bad Name"}, InvalidError),
    ({"name": "vm-0000000000000000"}, InvalidError),
    ({"labels": {"": "x"}}, InvalidError),
    ({"project": "other"}, InvalidError),
    ({"image": "nothing-here"}, NotFoundError),
    ({"image": "img-0000000000000000"}, NotFoundError),
    ({"image": "\udc80"}, NotFoundError),
    ({"image": "half"}, WrongStateError),
    ({"image": "going"}, WrongStateError),
    ({"image": "debian:12", "disk": GiB - 512}, InvalidError),
    ({"image": "debian:12", "disk": 2 * GiB + 1}, InvalidError),
    ({"image": "debian:12", "arch": "aarch64"}, InvalidError),
    ({"image": "debian:12", "firmware": Firmware.KERNEL}, InvalidError),
    ({"image": "debian:12", "kernel_arguments": "quiet"}, InvalidError),
    ({"image": "plain", "guest": Guest(user="me")}, InvalidError),
    ({"image": "plain", "guest": Guest(user_data="#cloud-config")}, InvalidError),
    ({"disk": 1 << 60}, InvalidError),
    ({"disk": -1}, InvalidError),
    ({"cpus": 1 << 40}, InvalidError),
    ({"memory": 3 * MiB}, InvalidError),
    ({"firmware": Firmware.KERNEL}, InvalidError),
    ({"machine": Machine.MICROVM}, InvalidError),
    ({"machine": Machine.MICROVM, "firmware": Firmware.BIOS}, UnsupportedError),
    ({"secure_boot": True, "firmware": Firmware.BIOS}, InvalidError),
    ({"ports": (Port(mac="x"),)}, InvalidError),
    ({"ports": (Port(),) * 9}, InvalidError),
    ({"forwards": (Forward(guest_port=80, host_address="bogus"),)}, InvalidError),
    ({"forwards": (Forward(guest_port=80, host_address="a\0b"),)}, InvalidError),
    ({"forwards": (Forward(guest_port=80, host_address="192.0.2.1"),)}, InvalidError),
    ({"forwards": (Forward(guest_port=0),)}, InvalidError),
    ({"forwards": (Forward(guest_port=80, host_port=9),) * 2}, InvalidError),
    ({"forwards": (Forward(guest_port=80),) * 65}, InvalidError),
]


@pytest.mark.parametrize(("values", "kind"), REFUSED)
async def test_a_refusal_leaves_nothing(
    world: World, values: dict[str, Any], kind: type[UndercroftError]
) -> None:
    images = [
        await world.image("debian:12", cloud_init=True),
        await world.image("plain"),
        await world.image("half", state=ImageState.PENDING),
        await world.image("going", state=ImageState.REMOVING),
    ]
    with pytest.raises(kind) as caught:
        await create(world, **({"name": "web1"} | values))
    assert type(caught.value) is kind
    await nothing_but(world, *images)
    assert await world.store.resolve(scope("vm"), "web1") is None


async def test_a_name_is_taken_once(world: World) -> None:
    await create(world, name="web1", disk=GiB)
    with pytest.raises(AlreadyExistsError) as caught:
        await create(world, name="web1")
    assert caught.value.object == "vm web1"
    assert caught.value.action
    assert len(await world.all(VM)) == 1
    await world.check_invariants()


async def test_of_many_who_want_a_name_one_gets_it(world: World) -> None:
    made = await asyncio.gather(
        *(create(world, name="web1", disk=GiB) for _ in range(20)), return_exceptions=True
    )
    assert sum(isinstance(one, Task) for one in made) == 1
    assert sum(isinstance(one, AlreadyExistsError) for one in made) == 19
    assert len(await world.all(Volume)) == 1
    await world.check_invariants()


async def test_invented_names_follow_the_image_and_never_collide(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.image("debian:12")
    tokens = iter(["aaaa", "aaaa", "aaaa", "bbbb"])
    monkeypatch.setattr("undercroft.operations.vm_create.secrets.token_hex", lambda _: next(tokens))
    await create(world, image="debian:12")
    await create(world, image="debian:12")
    assert {vm.meta.name for vm in await world.all(VM)} == {"debian-12-aaaa", "debian-12-bbbb"}


async def test_names_are_invented_from_an_id_and_from_nothing(world: World) -> None:
    image = await world.image("debian:12")
    await create(world, image=image.meta.id)
    await create(world)
    names = sorted(vm.meta.name for vm in await world.all(VM))
    assert names[0].startswith("img-")
    assert names[1].startswith("vm-")
    assert not any(is_id(name) for name in names)


async def test_many_at_once_get_ports_of_their_own(world: World) -> None:
    await world.image("debian:12", ssh=True)
    await asyncio.gather(*(create(world, image="debian:12") for _ in range(25)))
    ports = [vm.spec.ports[0].forwards[0].host_port for vm in await world.all(VM)]
    assert len(set(ports)) == 25
    await world.check_invariants()


async def test_two_adapters_never_share_a_chosen_port(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_create, "HOST_PORTS", range(20000, 20003))
    monkeypatch.setattr(vm_create, "_bindable", lambda forward: True)
    ports = (
        Port(forwards=(Forward(guest_port=1),)),
        Port(forwards=(Forward(guest_port=2), Forward(guest_port=3, host_port=20001))),
    )
    await create(world, name="a", ports=ports)
    vm = await world.vm("a")
    assert sorted(f.host_port for p in vm.spec.ports for f in p.forwards) == [20000, 20001, 20002]
    with pytest.raises(UndercroftError, match="no port of the host is free") as caught:
        await create(world, name="b", forwards=(Forward(guest_port=1),))
    assert caught.value.code == "unavailable"
    udp = Forward(guest_port=1, protocol=Protocol.UDP)
    await create(world, name="c", forwards=(udp,))
    await world.check_invariants()


async def test_a_port_that_somebody_listens_on_is_not_chosen(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        busy = listener.getsockname()[1]
        monkeypatch.setattr(vm_create, "HOST_PORTS", range(busy, busy + 1))
        with pytest.raises(UndercroftError, match="no port of the host is free"):
            await create(world, name="a", forwards=(Forward(guest_port=1),))


async def test_a_port_that_was_asked_for_is_taken_once(world: World) -> None:
    await create(world, name="a", forwards=(Forward(guest_port=80, host_port=8080),))
    with pytest.raises(AlreadyExistsError, match="port 8080") as caught:
        await create(world, name="b", disk=GiB, forwards=(Forward(guest_port=80, host_port=8080),))
    assert caught.value.object == "port 8080"
    assert len(await world.all(VM)) == 1
    assert await world.store.resolve(f"port/{HOST}", "tcp/8080") == (await world.vm("a")).meta.id


async def test_a_chosen_port_that_is_taken_meanwhile_is_chosen_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first_taken(*_: object) -> int:
        return next(numbers)

    numbers = iter([20001, 20002])
    monkeypatch.setattr(vm_create, "_free_port", first_taken)
    await world.store.transact(
        Transaction(claims=[Claim(f"port/{HOST}", "tcp/20001", "vm-0000000000000000")])
    )
    await create(world, name="a", forwards=(Forward(guest_port=1),))
    assert (await world.vm("a")).spec.ports[0].forwards[0].host_port == 20002


class Meddling:
    """A store in which somebody does something just before a transaction."""

    def __init__(self, store: Store, meddle: Any, times: int = 1) -> None:
        self._store = store
        self._meddle = meddle
        self._times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def transact(self, transaction: Transaction) -> int:
        if self._times > 0:
            self._times -= 1
            await self._meddle()
        return await self._store.transact(transaction)


def meddle(world: World, what: Any, times: int = 1) -> None:
    object.__setattr__(world.context, "store", Meddling(world.store, what, times))


async def test_an_image_that_is_removed_meanwhile(world: World) -> None:
    image = await world.image("debian:12")

    async def remove() -> None:
        await world.store.transact(Transaction(deletes=[Delete(Image, image.meta.id)]))

    meddle(world, remove)
    with pytest.raises(NotFoundError):
        await create(world, name="a", image="debian:12")
    await nothing_but(world)


async def test_an_image_that_begins_to_go_meanwhile(world: World) -> None:
    image = await world.image("debian:12")

    async def going() -> None:
        status = msgspec.structs.replace(image.status, state=ImageState.REMOVING)
        await world.store.transact(
            Transaction(puts=[Put(msgspec.structs.replace(image, status=status))])
        )

    meddle(world, going)
    with pytest.raises(WrongStateError):
        await create(world, name="a", image="debian:12")
    await nothing_but(world, image)


async def test_an_image_that_only_changes_meanwhile_is_no_obstacle(world: World) -> None:
    image = await world.image("debian:12")

    async def touch() -> None:
        def change(record: Image) -> Image:
            return msgspec.structs.replace(
                record,
                status=msgspec.structs.replace(record.status, size=record.status.size + 1),
            )

        await update(world.store, Image, image.meta.id, change)

    meddle(world, touch, times=3)
    await create(world, name="a", image="debian:12")
    await world.check_invariants()
