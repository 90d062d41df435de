"""Restoring backups: as a new VM, or over one that exists."""

from __future__ import annotations

import msgspec

from undercroft.model.backup import Backup, RestoreRequest
from undercroft.model.base import Meta
from undercroft.model.checks import check_vm_spec
from undercroft.model.errors import (
    AlreadyExistsError,
    DataCorruptError,
    InvalidError,
    NotFoundError,
    StaleError,
    UnsupportedError,
    WrongStateError,
)
from undercroft.model.image import Image, ImageState
from undercroft.model.names import check_name, new_id, new_mac
from undercroft.model.task import Task
from undercroft.model.vm import VM, Firmware, Power, VMSpec
from undercroft.model.volume import Volume, VolumeSpec, check_volume_size
from undercroft.operations.access import Caller
from undercroft.operations.asking import Volumes, ask
from undercroft.operations.backups import check_repository
from undercroft.operations.context import Context, new_event, new_task, scope
from undercroft.operations.datastores import place_checks, place_id, place_new
from undercroft.operations.snapshots import SHAPE
from undercroft.operations.uploads import check_key
from undercroft.operations.vm_create import assign_host_ports, port_claim
from undercroft.operations.volume_use import check_settled
from undercroft.store.interface import Check, Claim, Put, Transaction


async def restore(context: Context, caller: Caller, request: RestoreRequest) -> Task:
    """Restores a backup.

    Raises:
        NotFoundError: there is no such backup, VM, or image that it needs. AlreadyExistsError: the
            name is taken. WrongStateError: the VM runs, and ``force`` was not given.
        InvalidError: the VM has other disks.
    """
    if request.upload is None:
        caller.require("host.files")
    arguments: dict[str, object] = {"damaged": request.damaged}
    if request.upload is not None:
        arguments["upload"] = check_key(request.upload)
        backup = await context.services.archived(request.upload)
    else:
        arguments["repository"] = path = check_repository(request.repository)
        backup = await context.services.backup(path, request.backup)
    arguments["backup"] = backup.id
    arguments["moment"] = backup.created
    if request.over is not None:
        if request.name is not None:
            raise InvalidError("a backup becomes a new VM, or goes over one: not both")
        return await _over(context, caller, request, backup, arguments)
    return await _new(context, caller, request, backup, arguments)


async def _over(
    context: Context,
    caller: Caller,
    request: RestoreRequest,
    backup: Backup,
    arguments: dict[str, object],
) -> Task:
    caller.require("vm.snapshot")
    shape = _shape(backup)
    for disk in backup.disks:
        check_volume_size(disk.size)

    async def prepare(vm: VM, _: Volumes) -> tuple[VM, dict[str, object]]:
        alive = vm.status.state.alive
        if not request.force:
            off = f"{vm.label} is {vm.status.state}: going back would switch it off, and it"
            raise WrongStateError(
                f"{off if alive else vm.label} would lose what it is now",
                object=vm.label,
                action="if that is what you want: --force; or make a new VM of it with --as NAME",
                state=vm.status.state,
            )
        await check_settled(context, vm)
        arguments["off"] = alive and not request.start
        arguments["places"] = _places(vm, backup, shape)
        kept = {name: getattr(shape, name) for name in SHAPE}
        check_vm_spec(msgspec.structs.replace(vm.spec, **kept))
        arguments["shape"] = msgspec.to_builtins(kept)
        wanted = msgspec.structs.replace(
            vm,
            spec=msgspec.structs.replace(
                vm.spec, power=Power.RUNNING if request.start else Power.STOPPED
            ),
            meta=msgspec.structs.replace(vm.meta, generation=vm.meta.generation + 1),
        )
        return wanted, dict(arguments)

    return await ask(context, caller, request.over or "", "backup.restore", prepare)


def _places(vm: VM, backup: Backup, shape: VMSpec) -> list[int]:
    """For each disk of a VM, which one of a backup is to go over it: the same volume, if it is the
    VM's own backup, else the one at the same place.

    Raises:
        InvalidError: it has others.
    """
    now = [disk.volume for disk in vm.spec.disks]
    then = [disk.volume for disk in shape.disks]
    own = backup.vm == vm.meta.id
    if len(now) != len(backup.disks) or (own and sorted(now) != sorted(then)):
        others = len(now) == len(backup.disks)
        raise InvalidError(
            f"{vm.label} has other disks than when backup {backup.id} was made"
            if others
            else f"{vm.label} has {len(now)} disks, and backup {backup.id} {len(backup.disks)}",
            object=vm.label,
            action="make a new VM of it: --as NAME",
        )
    return [then.index(volume) for volume in now] if own else list(range(len(now)))


async def _new(
    context: Context,
    caller: Caller,
    request: RestoreRequest,
    backup: Backup,
    arguments: dict[str, object],
) -> Task:
    caller.require("vm.create")
    if request.start:
        caller.require("vm.power")
    name = check_name(request.name or backup.name)
    for _ in range(20):
        image = await _image(context, backup)
        where = await place_new(context, request.datastore)
        vm, volumes = await _compose(
            context, backup, name, image, place_id(where), start=request.start
        )
        task = new_task(
            context, "vm.create", vm, caller.name, start=request.start, restore=True, **arguments
        )
        vm = msgspec.structs.replace(vm, tasks=(task.meta.id,))
        event = new_event(
            context.clock(),
            "vm.created",
            vm,
            f"{vm.label} is to be restored from backup {backup.id}",
            by=caller.name,
        )
        claims = [Claim(scope("vm", vm.meta.project), name, vm.meta.id)]
        claims += [Claim(scope("volume"), v.meta.name, v.meta.id) for v in volumes]
        claims += [
            Claim(*port_claim(context.host, forward), vm.meta.id)
            for port in vm.spec.ports
            for forward in port.forwards
        ]
        checks = [Check(Image, image.meta.id, revision) for image, revision in image or ()]
        checks += place_checks(where)
        puts = [Put(vm), Put(task), Put(event), *(Put(volume) for volume in volumes)]
        try:
            await context.store.transact(Transaction(checks=checks, claims=claims, puts=puts))
        except AlreadyExistsError as taken:
            if str(taken.data.get("scope", "")).startswith("port/"):
                continue
            what = str(taken.data.get("name", name))
            raise AlreadyExistsError(
                f"{what} already exists",
                object=f"vm {name}",
                action="choose another name: --as NAME; or restore over it: --over NAME",
            ) from None
        except StaleError:
            continue
        return task
    raise StaleError("others keep interfering", object=f"vm {name}", action="try again")


def _shape(backup: Backup) -> VMSpec:
    """What the VM was like, as far as this version knows it.

    Raises:
        DataCorruptError: it makes no sense.
    """
    known = set(VMSpec.__struct_fields__)
    try:
        shape = msgspec.convert({k: v for k, v in backup.shape.items() if k in known}, VMSpec)
    except msgspec.ValidationError as error:
        raise DataCorruptError(
            f"what backup {backup.id} says of its VM makes no sense: {error}",
            object=f"backup {backup.id}",
        ) from error
    # A backup does not get to name files of this host; what was in the drives is not in it.
    drives = (msgspec.structs.replace(drive, medium=None) for drive in shape.cdroms)
    return msgspec.structs.replace(shape, cdroms=tuple(drives))


async def _image(context: Context, backup: Backup) -> list[tuple[Image, int]] | None:
    """The image that the VM was made from, if it is here; its kernel may be needed."""
    if backup.image is None:
        return None
    for item in (await context.store.list(Image)).items:
        image = item.record
        if image.status.digest == backup.image.digest and image.status.state is ImageState.READY:
            return [(image, item.revision)]
    if _shape(backup).firmware is Firmware.KERNEL:
        raise NotFoundError(
            f"the VM boots the kernel of image {backup.image.name}, which is not here",
            object=f"image {backup.image.name}",
            action="build or import that image first",
            digest=backup.image.digest,
        )
    return None


async def _compose(
    context: Context,
    backup: Backup,
    name: str,
    image: list[tuple[Image, int]] | None,
    datastore: str | None,
    *,
    start: bool,
) -> tuple[VM, list[Volume]]:
    shape = _shape(backup)
    now = context.clock()
    id = new_id("vm")
    if len(shape.disks) != len(backup.disks):
        raise UnsupportedError(f"backup {backup.id} does not have all disks of its VM")
    volumes = [
        Volume(
            meta=Meta(
                id=new_id("volume"),
                name=f"{name}-boot" if index == 0 else f"{name}-disk{index + 1}",
                created=now,
            ),
            spec=VolumeSpec(
                size=check_volume_size(disk.size),
                host=context.host,
                vm=id,
                datastore=datastore,
                encrypted=disk.encrypted,
            ),
        )
        for index, disk in enumerate(backup.disks)
    ]
    used = await _macs(context)
    ports = tuple(
        msgspec.structs.replace(
            port,
            mac=new_mac() if port.mac in used else port.mac,
            forwards=tuple(msgspec.structs.replace(f, host_port=0) for f in port.forwards),
        )
        for port in shape.ports
    )
    spec = msgspec.structs.replace(
        shape,
        host=context.host,
        power=Power.RUNNING if start else Power.STOPPED,
        passing=False,
        image=image[0][0].meta.id if image else None,
        disks=tuple(
            msgspec.structs.replace(disk, volume=volume.meta.id)
            for disk, volume in zip(shape.disks, volumes, strict=True)
        ),
        ports=await assign_host_ports(context, ports),
    )
    check_vm_spec(spec)
    return VM(meta=Meta(id=id, name=name, created=now), spec=spec), volumes


async def _macs(context: Context) -> set[str]:
    found: set[str] = set()
    for item in (await context.store.list(VM)).items:
        found.update(port.mac for port in item.record.spec.ports)
    return found
