"""From a VM's record to a plan that the hypervisor can carry out: names become files."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.layers import plan_layers
from undercroft.hypervisor.devices.base import HOT_PORTS
from undercroft.hypervisor.helper import HELPER_ARCHITECTURES
from undercroft.hypervisor.medium import check_medium
from undercroft.hypervisor.plan import (
    MachinePlan,
    PlanCdrom,
    PlanDisk,
    PlanForward,
    PlanPort,
)
from undercroft.model.errors import DataError, InvalidError, NotFoundError, UnsupportedError
from undercroft.model.image import Image, ImageContent
from undercroft.model.vm import (
    MAX_CDROMS,
    MAX_DISKS,
    VM,
    Accelerator,
    BootFirst,
    Cdrom,
    Disk,
    DiskBus,
    Firmware,
    Machine,
    disk_units,
)
from undercroft.model.volume import Volume
from undercroft.storage.seed import rewrite_seed, write_seed

_NAMESPACE = uuid.UUID("5b9c7a1e-6f0d-4c53-9d0e-0c5d7b7a4e10")


def vm_uuid(id: str) -> str:
    """The UUID that a guest sees, always the same for one VM."""
    return str(uuid.uuid5(_NAMESPACE, id))


def generation_id(vm: VM) -> str:
    """The VM generation id (Microsoft, "Virtual Machine Generation ID"): another one for each VM,
    and whenever it has gone back to what it was before."""
    returns = vm.status.returns or ""
    return str(uuid.uuid5(_NAMESPACE, f"generation/{vm.meta.id}/{returns}"))


async def make_plan(environment: Environment, vm: VM, seed: Path | None) -> MachinePlan:
    """Resolves a VM: image and volumes to files, accelerator to one that works.

    Raises:
        DataError: an image or volume that the VM needs is gone.
        UnsupportedError: the accelerator that the VM insists on does not work.
    """
    spec = vm.spec
    image = await _image(environment, vm)
    content = image.status.content if image is not None else None
    directory = _image_directory(environment, image)
    kernel = initrd = None
    arguments = ""
    if spec.firmware is Firmware.KERNEL:
        if content is None or directory is None or content.kernel is None:
            raise DataError(
                f"the image of {vm.label} has no kernel to boot",
                object=vm.label,
                action="restore the image, or change the firmware",
            )
        kernel = str(directory / content.kernel)
        initrd = str(directory / content.initrd) if content.initrd else None
        parts = (content.kernel_arguments, _hostname_argument(vm, content), spec.kernel_arguments)
        arguments = " ".join(part for part in parts if part)
    return MachinePlan(
        id=vm.meta.id,
        name=vm.meta.name,
        uuid=vm_uuid(vm.meta.id),
        directory=str(environment.vm_directory(vm.meta.id)),
        run_directory=str(environment.run_directory(vm.meta.id)),
        arch=spec.arch,
        machine=spec.machine,
        firmware=spec.firmware,
        secure_boot=spec.secure_boot,
        tpm=spec.tpm,
        accelerator=await _accelerator(environment, vm),
        cpus=spec.cpus,
        cpu_model=spec.cpu_model,
        memory=spec.memory,
        kernel=kernel,
        initrd=initrd,
        kernel_arguments=arguments,
        disks=await plan_disks(environment, vm),
        cdroms=await plan_cdroms(vm),
        seed=str(seed) if seed is not None else None,
        ports=plan_ports(vm),
        display=spec.display,
        agent=True,
        helper=spec.arch in HELPER_ARCHITECTURES,
        hot_ports=0 if spec.machine is Machine.MICROVM else HOT_PORTS,
        scsi=any(disk.bus is DiskBus.SCSI for disk in spec.disks),
        vmgenid=generation_id(vm),
        uid=vm.status.uid,
        gid=vm.status.uid,
        generation=vm.meta.generation,
    )


async def make_seed(environment: Environment, vm: VM, *, room: int = 0) -> Path | None:
    """Writes the cloud-init seed of a VM whose image reads one; None for any other. The file has at
    least ``room`` bytes, for `remake_seed`."""
    if vm.spec.image is None:
        return None
    image = await environment.store.get(Image, vm.spec.image)
    content = image.record.status.content if image is not None else None
    if content is None or not content.cloud_init:
        return None
    path = environment.vm_directory(vm.meta.id) / "seed.iso"
    await write_seed(
        path,
        instance_id=vm.meta.id,
        hostname=vm.spec.guest.hostname or vm.meta.name,
        guest=vm.spec.guest,
        room=room,
    )
    return path


async def remake_seed(path: Path, vm: VM) -> bool:
    """Makes a seed that a machine has open that of ``vm``; whether there was room for it."""
    return await rewrite_seed(
        path,
        instance_id=vm.meta.id,
        hostname=vm.spec.guest.hostname or vm.meta.name,
        guest=vm.spec.guest,
    )


async def _accelerator(environment: Environment, vm: VM) -> str:
    working = await environment.accelerator(vm.spec.arch)
    wanted = vm.spec.accelerator
    if wanted is Accelerator.KVM and working != "kvm":
        raise UnsupportedError(
            f"{vm.label} insists on KVM, which does not work on this host",
            object=vm.label,
            action="see why with: croft host show; or use --accelerator auto",
        )
    return working if wanted is Accelerator.AUTO else str(wanted)


async def _image(environment: Environment, vm: VM) -> Image | None:
    if vm.spec.image is None:
        return None
    found = await environment.store.get(Image, vm.spec.image)
    if found is None or found.record.status.digest is None:
        raise DataError(
            f"the image of {vm.label} is gone", object=vm.label, action="see: croft image ls"
        )
    return found.record


def _image_directory(environment: Environment, image: Image | None) -> Path | None:
    if image is None or image.status.digest is None:
        return None
    return environment.data / "images" / image.status.digest


def _hostname_argument(vm: VM, content: ImageContent) -> str:
    if content.cloud_init:
        return ""
    return f"undercroft.hostname={vm.spec.guest.hostname or vm.meta.name}"


async def plan_disks(environment: Environment, vm: VM) -> tuple[PlanDisk, ...]:
    """The disks of a VM with the files that their content is in.

    Raises:
        DataError: a volume, a layer or an image is gone.
    """
    disks = []
    units = disk_units(vm.spec.disks)
    for index, disk in enumerate(vm.spec.disks):
        found = await environment.store.get(Volume, disk.volume)
        if found is None:
            raise DataError(f"volume {disk.volume} of {vm.label} is gone", object=vm.label)
        volume = found.record
        boot_index = _boot_index(vm, index, BootFirst.DISK, MAX_CDROMS)
        disks.append(await plan_disk(environment, volume, disk, units[index], boot_index))
    return tuple(disks)


def _boot_index(vm: VM, index: int, kind: BootFirst, others: int) -> int | None:
    """When firmware tries the disk or drive at this position: behind as many as there can be of the
    ``others``, unless those of its kind come first."""
    if vm.spec.firmware is Firmware.KERNEL:
        return None
    return index if vm.spec.boot is kind else others + index


async def plan_cdroms(vm: VM) -> tuple[PlanCdrom, ...]:
    """The CD-ROM drives of a VM with what is in them.

    Raises:
        NotFoundError, InvalidError: a file that is in one is gone, or is no disc any more.
    """
    for drive in vm.spec.cdroms:
        if drive.medium is not None:
            try:
                await asyncio.to_thread(check_medium, drive.medium)
            except (NotFoundError, InvalidError) as error:
                raise type(error)(
                    f"the disc in drive {drive.unit} of {vm.label}: {error.message}",
                    object=f"cdrom {vm.meta.name}",
                    action=f"bring it back, or do without: croft cdrom eject {vm.meta.name} "
                    f"--drive {drive.unit} --force",
                ) from error
    return tuple(
        plan_cdrom(drive, boot_index=_boot_index(vm, index, BootFirst.CDROM, MAX_DISKS))
        for index, drive in enumerate(vm.spec.cdroms)
    )


def plan_cdrom(drive: Cdrom, node: str = "", boot_index: int | None = None) -> PlanCdrom:
    """One drive; ``node`` is what QEMU is to call what is in it."""
    return PlanCdrom(
        unit=drive.unit, bus=drive.bus, path=drive.medium, node=node, boot_index=boot_index
    )


async def plan_disk(
    environment: Environment, volume: Volume, disk: Disk, unit: int, boot_index: int | None = None
) -> PlanDisk:
    """One disk, with the files that its content is in.

    Raises:
        DataError: a layer or an image is gone.
    """
    top, *backing = await plan_layers(environment, volume.status.head, unit)
    return PlanDisk(
        path=top.path,
        format=top.format,
        node=top.node,
        backing=tuple(backing),
        key=top.key,
        thin=top.thin,
        bus=disk.bus,
        read_only=disk.read_only,
        serial=volume.meta.id.removeprefix("vol-"),
        boot_index=boot_index,
        unit=unit,
        limits=volume.spec.limits,
    )


def plan_ports(vm: VM) -> tuple[PlanPort, ...]:
    """The network adapters of a VM."""
    return tuple(
        PlanPort(
            mac=port.mac,
            mode=port.mode,
            model=port.model,
            hostname=vm.spec.guest.hostname or vm.meta.name,
            forwards=tuple(
                PlanForward(
                    guest_port=forward.guest_port,
                    host_port=forward.host_port,
                    host_address=forward.host_address,
                    protocol=forward.protocol,
                )
                for forward in port.forwards
            ),
        )
        for port in vm.spec.ports
    )
