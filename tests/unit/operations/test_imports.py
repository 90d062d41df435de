"""What becomes of a file that was found fit."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from tests.unit.operations.world import World
from undercroft.model.appliance import Appliance, ApplianceDisk, AppliancePort
from undercroft.model.errors import (
    AlreadyExistsError,
    ForbiddenError,
    InvalidError,
    UndercroftError,
)
from undercroft.model.transfer import ImportCreate, ImportSource
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import VM, Cdrom, DiskBus, Firmware, Machine, NicModel, PortMode
from undercroft.model.volume import Volume
from undercroft.operations.access import SYSTEM, VIEW, Caller
from undercroft.operations.context import find
from undercroft.operations.services import Examined

KEY = "0123456789abcdef"
OTHERS = Appliance(
    name="Old Server (copy)",
    cpus=2,
    memory=GiB + 1,
    firmware=Firmware.UEFI,
    disks=(
        ApplianceDisk(file="a.vmdk", size=8 * GiB, bus=DiskBus.SATA),
        ApplianceDisk(file=None, size=GiB, bus=DiskBus.SCSI),
    ),
    ports=(AppliancePort(network="VM Network"), AppliancePort(network="restricted")),
    notes=("a floppy drive is left out",),
)


async def made(world: World, appliance: Appliance = OTHERS, **values: Any) -> tuple[VM, list[str]]:
    """The VM, and what is said of it."""
    image = values.pop("image_digest", None)
    world.services.examined = Examined(appliance, image, str(values.pop("arch", "x86_64")))
    request = msgspec.convert({"upload": KEY, **values}, ImportCreate)
    task = await world.operations.imports.create(SYSTEM, request)
    vm = (await find(world.store, VM, task.spec.object.id)).record
    return vm, task.spec.arguments["notes"]


async def test_the_nearest_machine(world: World) -> None:
    vm, notes = await made(world)
    assert vm.meta.name == "old-server-copy"
    spec = vm.spec
    assert (spec.cpus, spec.memory, spec.firmware) == (2, GiB + MiB, Firmware.UEFI)
    assert [disk.bus for disk in spec.disks] == [DiskBus.SATA, DiskBus.SCSI]
    assert [port.mode for port in spec.ports] == [PortMode.USER, PortMode.RESTRICTED]
    assert len({port.mac for port in spec.ports}) == 2
    volumes = [(await find(world.store, Volume, disk.volume)).record for disk in spec.disks]
    assert [(v.meta.name, v.spec.size, v.spec.vm) for v in volumes] == [
        ("old-server-copy-boot", 8 * GiB, vm.meta.id),
        ("old-server-copy-disk2", GiB, vm.meta.id),
    ]
    assert notes == ["a floppy drive is left out", "network 'VM Network' becomes user"]


async def test_what_is_said_counts(world: World) -> None:
    networks = {"VM Network": "none", "*": "user"}
    vm, notes = await made(
        world, name="web1", cpus=8, memory=2 * GiB, firmware="bios", bus="virtio", nic="virtio",
        networks=networks, tpm=True, labels={"from": "there"},
    )  # fmt: skip
    spec = vm.spec
    assert (vm.meta.name, spec.cpus, spec.memory, spec.tpm) == ("web1", 8, 2 * GiB, True)
    assert {disk.bus for disk in spec.disks} == {DiskBus.VIRTIO}
    assert [(port.mode, port.model) for port in spec.ports] == [(PortMode.USER, NicModel.VIRTIO)]
    assert vm.meta.labels == {"from": "there"}
    assert not any("becomes" in note for note in notes)


async def test_names_that_are_taken(world: World) -> None:
    for expected in ("old-server-copy", "old-server-copy-2", "old-server-copy-3"):
        assert (await made(world))[0].meta.name == expected
    with pytest.raises(AlreadyExistsError):
        await made(world, name="old-server-copy-2")


@pytest.mark.parametrize(
    ("found", "expected"),
    [("WEB_01.ova", "web-01"), ("...", "imported"), ("ÄÖÜ", "imported"), ("a" * 90, "a" * 60)],
)
async def test_names_that_cannot_be(world: World, found: str, expected: str) -> None:
    appliance = msgspec.structs.replace(OTHERS, name=found)
    assert (await made(world, appliance))[0].meta.name == expected


async def test_more_disks_than_sata_takes(world: World) -> None:
    disks = tuple(ApplianceDisk(file=f"{n}.vmdk", size=GiB) for n in range(9))
    vm, notes = await made(world, msgspec.structs.replace(OTHERS, disks=disks))
    buses = [disk.bus for disk in vm.spec.disks]
    assert buses.count(DiskBus.SCSI) == 9 - buses.count(DiskBus.SATA) > 0
    assert any("virtio-scsi" in note for note in notes)


async def test_drives_come_empty_and_where_there_is_room(world: World) -> None:
    drives = (DiskBus.SATA, DiskBus.SCSI, DiskBus.SATA, DiskBus.SATA, DiskBus.SATA)
    disks = tuple(ApplianceDisk(file=f"{n}.vmdk", size=GiB) for n in range(4))
    vm, notes = await made(world, msgspec.structs.replace(OTHERS, disks=disks, cdroms=drives))
    assert vm.spec.cdroms == (
        Cdrom(unit=0),
        Cdrom(bus=DiskBus.SCSI, unit=1),
        Cdrom(bus=DiskBus.SCSI, unit=2),
        Cdrom(bus=DiskBus.SCSI, unit=3),
    )
    assert "of its 5 CD-ROM drives it has 4 here" in notes
    assert any("SATA port" in note for note in notes)
    vm, _ = await made(world, msgspec.structs.replace(OTHERS, cdroms=drives[:1]), arch="aarch64")
    assert vm.spec.cdroms == (Cdrom(bus=DiskBus.SCSI),)


async def test_other_processors(world: World) -> None:
    vm, _ = await made(world, arch="aarch64")
    assert vm.spec.machine is Machine.VIRT
    assert DiskBus.SATA not in {disk.bus for disk in vm.spec.disks}
    with pytest.raises(InvalidError, match="vax"):
        await made(world, arch="vax")


async def test_a_kernel_that_is_not_here(world: World) -> None:
    appliance = msgspec.structs.replace(OTHERS, firmware=Firmware.KERNEL)
    vm, notes = await made(world, appliance)
    assert vm.spec.firmware is Firmware.BIOS
    assert any("--image" in note for note in notes)


async def test_one_that_also_boots_by_firmware_has_its_kernel_again_where_that_is(
    world: World,
) -> None:
    """What debian:12 exports says BIOS, for others, and which image's kernel it booted."""
    appliance = msgspec.structs.replace(OTHERS, firmware=Firmware.BIOS)
    vm, notes = await made(world, appliance, image_digest="ab" * 32)
    assert (vm.spec.firmware, vm.spec.image) == (Firmware.BIOS, None)
    assert not any("--image" in note for note in notes)
    image = await world.image("debian:12", kernel="kernel")
    digest = image.status.digest
    vm, _ = await made(world, appliance, image_digest=digest)
    assert (vm.spec.firmware, vm.spec.image) == (Firmware.KERNEL, image.meta.id)
    vm, _ = await made(world, appliance, image_digest=digest, firmware="bios")
    assert (vm.spec.firmware, vm.spec.image) == (Firmware.BIOS, None)


@pytest.mark.parametrize(
    "values",
    [
        {"upload": None},
        {"path": "/srv/x.ova"},  # and an upload
        {"upload": "../../etc/passwd"},
        {"upload": None, "path": "relative.ova"},
        {"upload": None, "path": "/srv/\0x"},
        {"file": ""},
        {"file": "a\nb"},
        {"sha256": "abc"},
        {"networks": {"*": "bridge"}},
        {"networks": {"Nowhere": "user"}},
        {"memory": 5},
        {"name": "not a name"},
    ],
)
async def test_requests_that_make_no_sense(world: World, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidError):
        await made(world, **values)
    assert (await world.store.list(VM)).items == []


async def test_who_may(world: World) -> None:
    source = ImportSource(path="/srv/x.ova")
    with pytest.raises(ForbiddenError):
        await world.operations.imports.examine(Caller("eve", VIEW), source)
    some = Caller("bob", frozenset({"vm.create"}))
    with pytest.raises(ForbiddenError, match=r"host\.files"):
        await world.operations.imports.examine(some, source)
    with pytest.raises(ForbiddenError, match=r"vm\.power"):
        await world.operations.imports.create(some, ImportCreate(upload=KEY, start=True))
    with pytest.raises(ForbiddenError):
        await world.operations.uploads.get(Caller("eve", VIEW), KEY)
    with pytest.raises(UndercroftError, match="key"):
        await world.operations.uploads.get(SYSTEM, "..")
