"""CD-ROM drives, and who may put what into them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import World, holding
from undercroft.model.errors import (
    BusyError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    UndercroftError,
    UnsupportedError,
    WrongStateError,
)
from undercroft.model.requests import (
    CloneRequest,
    EjectRequest,
    InsertRequest,
    NewCdrom,
    VMChange,
    VMCreate,
)
from undercroft.model.task import Task
from undercroft.model.vm import (
    VM,
    BootFirst,
    Cdrom,
    DiskBus,
    Display,
    Firmware,
    Machine,
    Power,
    VMState,
)
from undercroft.operations.access import SYSTEM
from undercroft.operations.warm import warm_key
from undercroft.store.interface import update

ISO = "/isos/debian.iso"
EMPTY, FULL = NewCdrom(), NewCdrom(path=ISO)


async def created(world: World, *drives: NewCdrom, **values: Any) -> VM:
    return await world.created("web1", **{"disk": 1 << 30, **values}, cdroms=drives)


async def test_a_vm_begins_with_its_drives(world: World) -> None:
    vm = await created(world, FULL, NewCdrom(bus=DiskBus.SCSI), boot=BootFirst.CDROM)
    assert vm.spec.cdroms == (
        Cdrom(medium=ISO, unit=0),
        Cdrom(bus=DiskBus.SCSI, unit=1),
    )
    assert vm.spec.boot is BootFirst.CDROM
    assert ("check_medium", ISO) in world.services.calls


async def test_the_bus_follows_what_the_vm_is_made_of(world: World) -> None:
    await world.image("debian:12")
    made: list[tuple[dict[str, Any], DiskBus]] = [
        ({"disk": 1 << 30}, DiskBus.SATA),
        ({"image": "debian:12"}, DiskBus.SCSI),
        (
            {"arch": "aarch64", "machine": Machine.VIRT, "firmware": Firmware.UEFI},
            DiskBus.SCSI,
        ),
    ]
    for number, (values, bus) in enumerate(made):
        vm = await world.created(f"vm{number}", cdroms=(EMPTY,), **values)
        assert vm.spec.cdroms[0].bus == bus


@pytest.mark.parametrize(
    ("error", "values"),
    [
        (InvalidError, {"cdroms": (NewCdrom(path="debian.iso"),)}),
        (InvalidError, {"cdroms": (NewCdrom(path="/a\nb.iso"),)}),
        (InvalidError, {"cdroms": (NewCdrom(path="/" + "x" * 5000),)}),
        (NotFoundError, {"cdroms": (NewCdrom(path="/none.iso"),)}),
        (InvalidError, {"cdroms": (EMPTY,) * 5}),
        (UnsupportedError, {"cdroms": (NewCdrom(bus=DiskBus.VIRTIO),)}),
        (InvalidError, {"cdroms": (EMPTY,), "boot": BootFirst.CDROM, "image": "kernel"}),
        (
            UnsupportedError,
            {
                "cdroms": (NewCdrom(bus=DiskBus.SATA),),
                "image": "kernel",
                "machine": Machine.MICROVM,
                "display": Display.NONE,
            },
        ),
    ],
)
async def test_what_makes_no_sense_is_refused(
    world: World, error: type[UndercroftError], values: dict[str, Any]
) -> None:
    await world.image("kernel", kernel="kernel")
    values = {"firmware": Firmware.KERNEL, **values} if "image" in values else values
    with pytest.raises(error):
        await world.operations.vms.create(SYSTEM, msgspec.structs.replace(VMCreate(), **values))
    assert not await world.all(VM)


async def test_only_who_may_name_files_of_the_host_does(world: World) -> None:
    vm = await created(world, EMPTY)
    nobody = holding("vm.create", "vm.change")
    for asked in (
        world.operations.vms.create(nobody, VMCreate(cdroms=(FULL,))),
        world.operations.cdroms.insert(nobody, "web1", 0, InsertRequest(path=ISO)),
        world.operations.cdroms.add(nobody, "web1", FULL),
    ):
        with pytest.raises(ForbiddenError, match=r"host\.files"):
            await asked
    assert ("check_medium", ISO) not in world.services.calls  # nor learns what exists
    for asked in (
        world.operations.cdroms.insert(holding("host.files"), "web1", 0, InsertRequest(path=ISO)),
        world.operations.cdroms.eject(holding("host.files"), "web1", 0, EjectRequest()),
        world.operations.cdroms.remove(holding("host.files"), "web1", 0),
    ):
        with pytest.raises(ForbiddenError, match=r"vm\.change"):
            await asked
    assert (await world.vm(vm.meta.id)).tasks == ()


async def test_discs_go_in_and_out(world: World) -> None:
    await created(world, FULL, start=True)
    task = await world.operations.cdroms.insert(SYSTEM, "web1", 0, InsertRequest(path="/b.iso"))
    assert task.spec.verb == "cdrom.insert"
    assert task.spec.arguments == {"drive": 0, "path": "/b.iso", "force": False}
    # Until that is done the record says what is in it; and what is taken of all of it must wait.
    assert (await world.vm("web1")).spec.cdroms[0].medium == ISO
    with pytest.raises(BusyError):
        await world.operations.vms.clone(SYSTEM, "web1", CloneRequest())
    await world.done(task)
    task = await world.operations.cdroms.eject(SYSTEM, "web1", 0, EjectRequest(force=True))
    assert task.spec.arguments == {"drive": 0, "force": True}
    with pytest.raises(NotFoundError, match="no CD-ROM drive 1"):
        await world.operations.cdroms.insert(SYSTEM, "web1", 1, InsertRequest(path=ISO))
    with pytest.raises(NotFoundError):
        await world.operations.cdroms.insert(SYSTEM, "web1", 0, InsertRequest(path="/none.iso"))


async def test_an_empty_drive_has_nothing_to_eject_unless_it_is_on_its_way(world: World) -> None:
    await created(world, EMPTY)
    with pytest.raises(WrongStateError, match="empty"):
        await world.operations.cdroms.eject(SYSTEM, "web1", 0, EjectRequest())
    await world.operations.cdroms.insert(SYSTEM, "web1", 0, InsertRequest(path=ISO))
    await world.operations.cdroms.eject(SYSTEM, "web1", 0, EjectRequest())


async def test_of_a_suspended_vm_a_disc_is_only_taken_by_force(world: World) -> None:
    await created(world, FULL)
    await world.put("web1", VMState.SUSPENDED, Power.SUSPENDED)
    with pytest.raises(WrongStateError, match="suspended"):
        await world.operations.cdroms.insert(SYSTEM, "web1", 0, InsertRequest(path=ISO))
    with pytest.raises(WrongStateError, match="suspended"):
        await world.operations.cdroms.eject(SYSTEM, "web1", 0, EjectRequest())
    await world.operations.cdroms.eject(SYSTEM, "web1", 0, EjectRequest(force=True))


async def test_drives_come_and_go(world: World) -> None:
    vm = await created(world)
    with pytest.raises(NotFoundError, match=r"has no CD-ROM drive$"):
        await world.operations.cdroms.insert(SYSTEM, "web1", 0, InsertRequest(path=ISO))
    task = await world.operations.cdroms.add(SYSTEM, "web1", FULL)
    assert task.spec.arguments == {"drive": 0, "bus": "sata", "path": ISO}
    with pytest.raises(BusyError):
        await world.operations.cdroms.add(SYSTEM, "web1", EMPTY)
    await world.done(task)

    def with_drive(record: VM) -> VM:
        drives = (Cdrom(unit=0), Cdrom(unit=2))
        return msgspec.structs.replace(
            record, spec=msgspec.structs.replace(record.spec, cdroms=drives)
        )

    await update(world.store, VM, vm.meta.id, with_drive)
    task = await world.operations.cdroms.add(SYSTEM, "web1", NewCdrom(bus=DiskBus.SCSI))
    assert task.spec.arguments["drive"] == 1
    await world.operations.cdroms.remove(SYSTEM, "web1", 2)


async def test_to_one_that_runs_a_drive_comes_on_a_bus_that_can(world: World) -> None:
    await created(world, start=True)
    task = await world.operations.cdroms.add(SYSTEM, "web1", EMPTY)
    assert task.spec.arguments == {"drive": 0, "bus": "scsi", "path": None}
    await world.done(task)
    await world.put("web1", VMState.SUSPENDED, Power.SUSPENDED)
    with pytest.raises(WrongStateError, match="suspended"):
        await world.operations.cdroms.add(SYSTEM, "web1", EMPTY)


async def test_what_is_tried_first_can_be_changed(world: World) -> None:
    await created(world, FULL)
    await world.operations.vms.set(SYSTEM, "web1", VMChange(boot=BootFirst.CDROM))
    assert (await world.vm("web1")).spec.boot is BootFirst.CDROM


async def test_clones_have_the_drives_and_what_is_in_them(world: World) -> None:
    await created(world, FULL)
    tasks: list[Task] = await world.operations.vms.clone(
        SYSTEM, "web1", CloneRequest(names=("web2",))
    )
    assert (await world.vm(tasks[0].spec.object.id)).spec.cdroms == (Cdrom(medium=ISO),)


async def test_one_with_a_disc_boots(world: World) -> None:
    image = await world.image("debian:12", agent=True)
    request = VMCreate(image="debian:12", start=True)
    vm = await world.created("web1", image="debian:12")
    content = image.status.content
    without = msgspec.structs.replace(vm, spec=msgspec.structs.replace(vm.spec, disks=()))
    assert warm_key(request, without, [], content) is not None
    spec = msgspec.structs.replace(without.spec, cdroms=(Cdrom(medium=ISO),))
    assert warm_key(request, msgspec.structs.replace(vm, spec=spec), [], content) is None
