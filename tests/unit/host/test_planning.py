"""From a record to a plan: which names become which files."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.unit.host.rig import Rig
from tests.unit.operations.world import HOST
from undercroft.host.planning import generation_id, make_plan, make_seed, vm_uuid
from undercroft.hypervisor.plan import MachinePlan, PlanCdrom, PlanForward, PlanPort
from undercroft.model.base import Meta
from undercroft.model.errors import DataError, NotFoundError, UnsupportedError
from undercroft.model.image import Image, ImageDefaults
from undercroft.model.requests import NewCdrom
from undercroft.model.units import GiB, MiB
from undercroft.model.vm import (
    VM,
    Accelerator,
    BootFirst,
    Disk,
    DiskBus,
    Firmware,
    Forward,
    Guest,
    Port,
    VMSpec,
    VMStatus,
)
from undercroft.model.volume import Volume
from undercroft.store.interface import Delete, Put, Transaction

DIGEST = "ab" * 32


async def made(rig: Rig, **values: Any) -> VM:
    """A VM that is only written down."""
    await rig.close()
    vm = await rig.world.created("web1", **values)
    if vm.spec.disks:
        await rig.disk(vm)
    return vm


async def test_a_whole_plan(rig: Rig) -> None:
    defaults = ImageDefaults(cpus=2, memory=GiB, firmware="uefi", user="debian")
    await rig.world.image("debian:12", defaults=defaults, cloud_init=True)
    vm = await made(
        rig,
        image="debian:12",
        secure_boot=True,
        tpm=True,
        cpu_model="max",
        ports=(Port(mac="52:54:00:00:00:01", forwards=(Forward(guest_port=22, host_port=2222),)),),
    )
    data = rig.environment.data
    volume = vm.spec.disks[0].volume
    plan = await make_plan(rig.environment, vm, Path("/seed.iso"))
    assert msgspec.to_builtins(plan) == msgspec.to_builtins(
        MachinePlan(
            id=vm.meta.id,
            name="web1",
            uuid=vm_uuid(vm.meta.id),
            directory=str(data / "vms" / vm.meta.id),
            run_directory=str(data / "run" / "vms" / vm.meta.id),
            firmware=Firmware.UEFI,
            secure_boot=True,
            tpm=True,
            accelerator="tcg",
            cpus=2,
            cpu_model="max",
            memory=GiB,
            seed="/seed.iso",
            display=vm.spec.display,
            helper=True,
            vmgenid=generation_id(vm),
            generation=1,
            hot_ports=16,
            disks=plan.disks,
            ports=(
                PlanPort(
                    mac="52:54:00:00:00:01",
                    hostname="web1",
                    forwards=(PlanForward(guest_port=22, host_port=2222),),
                ),
            ),
        )
    )
    (disk,) = plan.disks
    assert disk.path == str(await rig.disk(vm))
    assert disk.node == f"{Path(disk.path).stem}.0"
    assert [(layer.path, layer.format) for layer in disk.backing] == [
        (str(data / "images" / DIGEST / "disk.qcow2"), "qcow2")
    ]
    assert (disk.bus, disk.read_only, disk.boot_index) == (DiskBus.VIRTIO, False, 0)
    assert len(disk.serial) <= 20
    assert volume.endswith(disk.serial)


async def test_the_same_vm_gives_the_same_plan(rig: Rig) -> None:
    vm = await made(rig, disk=GiB)
    assert await make_plan(rig.environment, vm, None) == await make_plan(rig.environment, vm, None)


async def test_a_kernel_boots_with_its_own_arguments_and_the_users(rig: Rig) -> None:
    await rig.world.image(
        "tiny",
        defaults=ImageDefaults(machine="microvm", firmware="kernel"),
        disk=None,
        virtual_size=0,
        kernel="vmlinuz",
        initrd="initrd.img",
        kernel_arguments="console=ttyS0",
    )
    vm = await made(rig, image="tiny", kernel_arguments="quiet", disk=16 * MiB)
    plan = await make_plan(rig.environment, vm, None)
    directory = rig.environment.data / "images" / DIGEST
    assert plan.kernel == str(directory / "vmlinuz")
    assert plan.initrd == str(directory / "initrd.img")
    assert plan.kernel_arguments == "console=ttyS0 undercroft.hostname=web1 quiet"
    (disk,) = plan.disks
    assert disk.backing == ()
    assert disk.boot_index is None
    named = msgspec.structs.replace(
        vm, spec=msgspec.structs.replace(vm.spec, guest=Guest(hostname="other"))
    )
    plan = await make_plan(rig.environment, named, None)
    assert "undercroft.hostname=other" in plan.kernel_arguments


async def test_disks_boot_in_their_order(rig: Rig) -> None:
    vm = await made(rig, disk=GiB)
    other = await rig.world.created("web2", disk=GiB)
    await rig.disk(other)
    extra = Disk(volume=other.spec.disks[0].volume, bus=DiskBus.NVME, read_only=True)
    spec = msgspec.structs.replace(vm.spec, disks=(*vm.spec.disks, extra))
    plan = await make_plan(rig.environment, msgspec.structs.replace(vm, spec=spec), None)
    assert [(d.boot_index, d.bus, d.read_only) for d in plan.disks] == [
        (0, DiskBus.VIRTIO, False),
        (1, DiskBus.NVME, True),
    ]


async def test_discs_boot_after_disks_or_before_them(rig: Rig, tmp_path: Path) -> None:
    disc = tmp_path / "a.iso"
    disc.write_bytes(bytes(16 * 2048) + b"\x01CD001")
    drives = (NewCdrom(), NewCdrom(path=str(disc), bus=DiskBus.SCSI))
    vm = await made(rig, disk=GiB, cdroms=drives)
    plan = await make_plan(rig.environment, vm, None)
    assert [disk.boot_index for disk in plan.disks] == [0]
    assert plan.cdroms == (
        PlanCdrom(unit=0, boot_index=16),
        PlanCdrom(unit=1, bus=DiskBus.SCSI, path=str(disc), boot_index=17),
    )
    first = msgspec.structs.replace(vm.spec, boot=BootFirst.CDROM)
    plan = await make_plan(rig.environment, msgspec.structs.replace(vm, spec=first), None)
    assert [disk.boot_index for disk in plan.disks] == [4]
    assert [drive.boot_index for drive in plan.cdroms] == [0, 1]
    disc.unlink()
    with pytest.raises(NotFoundError, match="the disc in drive 1 of vm web1") as caught:
        await make_plan(rig.environment, vm, None)
    assert "croft cdrom eject web1 --drive 1" in str(caught.value.action)


async def test_the_vm_runs_as_its_own_uid(rig: Rig) -> None:
    vm = await made(rig)
    status = msgspec.structs.replace(vm.status, uid=300007)
    plan = await make_plan(rig.environment, msgspec.structs.replace(vm, status=status), None)
    assert (plan.uid, plan.gid) == (300007, 300007)


@pytest.mark.parametrize(
    ("wanted", "working", "chosen"),
    [
        (Accelerator.AUTO, "kvm", "kvm"),
        (Accelerator.AUTO, "tcg", "tcg"),
        (Accelerator.TCG, "kvm", "tcg"),
        (Accelerator.KVM, "kvm", "kvm"),
        (Accelerator.KVM, "tcg", None),
    ],
)
async def test_accelerators(
    rig: Rig, wanted: Accelerator, working: str, chosen: str | None
) -> None:
    async def works(arch: str) -> str:
        assert arch == "x86_64"
        return working

    rig.environment.accelerator = works
    vm = await made(rig, accelerator=wanted)
    if chosen is None:
        with pytest.raises(UnsupportedError, match="insists on KVM"):
            await make_plan(rig.environment, vm, None)
    else:
        assert (await make_plan(rig.environment, vm, None)).accelerator == chosen


async def test_what_is_gone_is_named(rig: Rig) -> None:
    image = await rig.world.image("debian:12")
    vm = await made(rig, image="debian:12")
    for gone in (Delete(Volume, vm.spec.disks[0].volume), Delete(Image, image.meta.id)):
        await rig.store.transact(Transaction(deletes=[gone]))
        with pytest.raises(DataError, match="gone") as caught:
            await make_plan(rig.environment, vm, None)
        assert caught.value.object == "vm web1"


async def test_a_kernel_that_is_gone(rig: Rig) -> None:
    image = await rig.world.image(
        "tiny", defaults=ImageDefaults(firmware="kernel"), kernel="vmlinuz"
    )
    vm = await made(rig, image="tiny")
    assert image.status.content is not None
    content = msgspec.structs.replace(image.status.content, kernel=None)
    status = msgspec.structs.replace(image.status, content=content)
    await rig.store.transact(Transaction(puts=[Put(msgspec.structs.replace(image, status=status))]))
    with pytest.raises(DataError, match="no kernel to boot"):
        await make_plan(rig.environment, vm, None)


async def test_a_seed_only_for_those_who_read_it(rig: Rig) -> None:
    await rig.world.image("debian:12", cloud_init=True)
    await rig.world.image("plain")
    bare = await made(rig)
    plain = await rig.world.created("b", image="plain")
    cloud = await rig.world.created("c", image="debian:12")
    rig.environment.vm_directory(cloud.meta.id).mkdir(parents=True)
    assert (
        await make_seed(
            rig.environment,
            bare,
        )
        is None
    )
    assert await make_seed(rig.environment, plain) is None
    path = await make_seed(rig.environment, cloud)
    assert path is not None
    content = path.read_bytes()
    assert cloud.meta.id.encode() in content
    assert path.parent == rig.environment.vm_directory(cloud.meta.id)


def test_identities() -> None:
    assert uuid.UUID(vm_uuid("vm-a")) != uuid.UUID(vm_uuid("vm-b"))
    assert vm_uuid("vm-a") == vm_uuid("vm-a")
    vm = VM(meta=Meta(id="vm-a", name="a", created=1.0), spec=VMSpec(host=HOST))
    other = msgspec.structs.replace(vm, meta=Meta(id="vm-b", name="b", created=1.0))
    again = msgspec.structs.replace(vm, status=VMStatus(returns=1))
    ids = {generation_id(vm), generation_id(again), generation_id(other), vm_uuid("vm-a")}
    assert len(ids) == 4
