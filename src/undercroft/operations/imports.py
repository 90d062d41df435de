"""Importing: VMs made of files that come from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from undercroft.model.appliance import Appliance, ApplianceDisk
from undercroft.model.base import Meta
from undercroft.model.checks import MAX_SATA, check_vm_spec
from undercroft.model.datastore import Datastore
from undercroft.model.errors import AlreadyExistsError, InvalidError, StaleError
from undercroft.model.image import Image, ImageState
from undercroft.model.names import check_labels, check_name, new_id, new_mac
from undercroft.model.task import Task
from undercroft.model.transfer import ImportCreate, ImportSource
from undercroft.model.units import MiB
from undercroft.model.vm import (
    MAX_CDROMS,
    VM,
    Cdrom,
    Disk,
    DiskBus,
    Display,
    Firmware,
    Machine,
    Port,
    PortMode,
    Power,
    VMSpec,
)
from undercroft.model.volume import Volume, VolumeSpec, check_volume_size
from undercroft.operations.access import Caller
from undercroft.operations.context import Context, find, new_event, new_task, scope
from undercroft.operations.datastores import place_checks, place_id, place_new
from undercroft.operations.services import Examined
from undercroft.operations.uploads import check_key
from undercroft.store.interface import Check, Claim, Put, Transaction, Versioned

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_MODES = {"user": PortMode.USER, "restricted": PortMode.RESTRICTED, "none": None}
_SAME = {str(mode): mode for mode in PortMode}  # networks of our own exports
_ARCHS = {"x86_64": Machine.Q35, "i386": Machine.Q35}
_ATTEMPTS = 20


class ImportOperations:
    """Every verb on files that come in."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def examine(self, caller: Caller, source: ImportSource) -> Appliance:
        """What is in a file, without making anything of it.

        Raises:
            HostileImageError: it is refused. NotFoundError: there is no such file or upload.
        """
        _check_source(caller, source)
        return (await self._context.services.examine(source)).appliance

    async def create(self, caller: Caller, request: ImportCreate) -> Task:
        """Writes a new VM with the shape that the file asks for, and the task that takes its disks
        over. An upload is used up by that, however it ends. The task's ``result`` has the notes.

        Raises:
            HostileImageError, InvalidError, UnsupportedError: it is refused, or makes no VM.
            NotFoundError: no such file or upload. AlreadyExistsError: the name is taken.
        """
        _check_source(caller, request)
        if request.start:
            caller.require("vm.power")
        check_labels(request.labels)
        if request.name is not None:
            check_name(request.name)
        if request.sha256 is not None and _SHA256.fullmatch(request.sha256) is None:
            raise InvalidError("a SHA-256 checksum has 64 hexadecimal digits")
        where = await place_new(self._context, request.datastore)
        examined = await self._context.services.examine(request)
        wanted = request.name or _suggest(examined.appliance.name)
        for number in range(_ATTEMPTS):
            name = wanted if number == 0 or request.name else f"{wanted[:58]}-{number + 1}"
            task = await self._write(caller, request, examined, name, where)
            if task is not None:
                return task
            if request.name is not None:
                raise AlreadyExistsError(
                    f"vm {name} already exists",
                    object=f"vm {name}",
                    action="choose another name: --name NAME",
                )
        raise StaleError("others keep taking the names", action="give a name")

    async def _write(
        self,
        caller: Caller,
        request: ImportCreate,
        examined: Examined,
        name: str,
        where: Versioned[Datastore] | None,
    ) -> Task | None:
        """The task; None if the name is taken."""
        context = self._context
        found = examined.appliance
        notes = list(found.notes)
        now, id = context.clock(), new_id("vm")
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
                    datastore=place_id(where),
                ),
            )
            for index, disk in enumerate(found.disks)
        ]
        image, checks = await self._image(request, examined, notes)
        spec = _spec(context.host, request, examined, image, volumes, notes)
        check_vm_spec(spec)
        meta = Meta(id=id, name=name, created=now, labels=request.labels)
        vm = VM(meta=meta, spec=spec)
        task = new_task(
            context,
            "vm.create",
            vm,
            caller.name,
            start=request.start,
            notes=notes,
            **{
                "import": {
                    "source": msgspec.to_builtins(_source_of(request)),
                    "sha256": request.sha256.lower() if request.sha256 else None,
                    "nvram": spec.firmware is Firmware.UEFI,
                }
            },
        )
        vm = msgspec.structs.replace(vm, tasks=(task.meta.id,))
        event = new_event(now, "vm.created", vm, f"{vm.label} is being imported", by=caller.name)
        claims = [Claim(scope("vm"), name, id)]
        claims += [Claim(scope("volume"), volume.meta.name, volume.meta.id) for volume in volumes]
        puts = [Put(vm), Put(task), Put(event), *(Put(volume) for volume in volumes)]
        checks = [*checks, *place_checks(where)]
        try:
            await context.store.transact(Transaction(checks=checks, claims=claims, puts=puts))
        except AlreadyExistsError as taken:
            if request.name is not None and str(taken.data.get("scope", "")) == scope("volume"):
                raise
            return None
        return task

    async def _image(
        self, request: ImportCreate, examined: Examined, notes: list[str]
    ) -> tuple[Image | None, Sequence[Check]]:
        """The image whose kernel it boots: the one that was named, or the very one that it had."""
        store = self._context.store
        if request.image is not None:
            found = await find(store, Image, request.image)
            content = found.record.status.content
            if content is None or content.kernel is None:
                raise InvalidError(
                    f"{found.record.label} has no kernel that could be booted",
                    object=found.record.label,
                )
            return found.record, [Check(Image, found.record.meta.id, found.revision)]
        firmware = request.firmware or examined.appliance.firmware
        direct = firmware is Firmware.KERNEL
        # One that also boots by firmware goes on as it was where its image is, and else by that.
        if not direct and (request.firmware is not None or examined.image is None):
            return None, []
        for item in (await store.list(Image)).items:
            status = item.record.status
            if status.state is ImageState.READY and status.digest == examined.image:
                return item.record, [Check(Image, item.record.meta.id, item.revision)]
        if direct:
            notes.append("the image whose kernel it booted is not here: name one with --image")
        return None, []


def _check_source(caller: Caller, source: ImportSource) -> None:
    caller.require("vm.create")
    if (source.upload is None) == (source.path is None):
        raise InvalidError("name an upload or a file", action="give one of upload and path")
    if source.upload is not None:
        check_key(source.upload)
    if source.path is not None:
        caller.require("host.files")
        if not source.path.startswith("/") or "\0" in source.path or len(source.path) > 4096:
            raise InvalidError(
                f"{source.path[:80]!r} is not an absolute path", action="begin it with /"
            )
    if not source.file or len(source.file) > 255 or not source.file.isprintable():
        raise InvalidError("the name of the file is empty or not printable")


def _source_of(request: ImportCreate) -> ImportSource:
    return ImportSource(
        upload=request.upload,
        path=request.path,
        stamp=request.stamp,
        file=request.file,
        format=request.format,
        system=request.system,
    )


def _spec(
    host: str,
    request: ImportCreate,
    examined: Examined,
    image: Image | None,
    volumes: Sequence[Volume],
    notes: list[str],
) -> VMSpec:
    found = examined.appliance
    firmware = request.firmware or (Firmware.KERNEL if image is not None else found.firmware)
    if firmware is Firmware.KERNEL and image is None:
        firmware = Firmware.BIOS
    arch = examined.arch
    secure = found.secure_boot if request.secure_boot is None else request.secure_boot
    memory = request.memory if request.memory is not None else found.memory
    if request.memory is None and memory % MiB:
        memory = -(-memory // MiB) * MiB
    machine = _ARCHS.get(arch, Machine.VIRT)
    disks = _disks(request.bus, machine, found.disks, volumes, notes)
    return VMSpec(
        host=host,
        power=Power.RUNNING if request.start else Power.STOPPED,
        cpus=request.cpus if request.cpus is not None else found.cpus,
        memory=memory,
        arch=arch,
        machine=machine,
        firmware=Firmware.UEFI if secure else firmware,
        secure_boot=secure,
        tpm=found.tpm if request.tpm is None else request.tpm,
        display=Display.VIRTIO if machine is Machine.VIRT else Display.STD,
        image=image.meta.id if image is not None else None,
        disks=disks,
        cdroms=_cdroms(machine, found.cdroms, disks, notes),
        ports=_ports(request, found, notes),
    )


def _disks(
    wanted: DiskBus | None,
    machine: Machine,
    disks: Sequence[ApplianceDisk],
    volumes: Sequence[Volume],
    notes: list[str],
) -> tuple[Disk, ...]:
    made: list[Disk] = []
    sata = 0
    for disk, volume in zip(disks, volumes, strict=True):
        bus = wanted or disk.bus
        if bus is DiskBus.SATA and wanted is None:
            sata += 1
            if sata > MAX_SATA or machine is Machine.VIRT:
                bus = DiskBus.SCSI
                note = "disks that its board has no SATA port for are on virtio-scsi"
                notes += [note] if note not in notes else []
        made.append(Disk(volume=volume.meta.id, bus=bus))
    return tuple(made)


def _cdroms(
    machine: Machine, drives: Sequence[DiskBus], disks: Sequence[Disk], notes: list[str]
) -> tuple[Cdrom, ...]:
    """Its CD-ROM drives, empty, on SATA as long as there are ports."""
    if len(drives) > MAX_CDROMS:
        notes.append(f"of its {len(drives)} CD-ROM drives it has {MAX_CDROMS} here")
    free = MAX_SATA - sum(disk.bus is DiskBus.SATA for disk in disks)
    if machine is not Machine.Q35:
        free = 0
    made: list[Cdrom] = []
    for unit, bus in enumerate(drives[:MAX_CDROMS]):
        if bus is DiskBus.SATA and free == 0:
            bus = DiskBus.SCSI
            note = "CD-ROM drives that its board has no SATA port for are on virtio-scsi"
            notes += [note] if note not in notes else []
        free -= bus is DiskBus.SATA
        made.append(Cdrom(bus=bus, unit=unit))
    return tuple(made)


def _ports(request: ImportCreate, found: Appliance, notes: list[str]) -> tuple[Port, ...]:
    for name, wanted in request.networks.items():
        if wanted not in _MODES:
            raise InvalidError(
                f"network {wanted[:40]!r} does not exist", action="use user, restricted or none"
            )
        if name != "*" and not any(port.network == name for port in found.ports):
            names = ", ".join(sorted({port.network for port in found.ports})) or "none"
            raise InvalidError(f"it has no network {name[:40]!r}", action=f"it has: {names}")
    ports: list[Port] = []
    for port in found.ports:
        text = request.networks.get(port.network, request.networks.get("*", ""))
        mode = _MODES[text] if text else _SAME.get(port.network, PortMode.USER)
        if mode is not None:
            model = request.nic or port.model
            ports.append(Port(mode=mode, model=model, mac=new_mac()))
        if not text and port.network and port.network not in _SAME:
            note = f"network {port.network[:40]!r} becomes {mode}"
            if note not in notes:
                notes.append(note)
    return tuple(ports)


def _suggest(name: str) -> str:
    """A name for the VM from what it was called."""
    name = re.sub(r"\.(ova|ovf|qcow2|raw|img|vmdk|vhdx?|vdi|tar)$", "", name.lower())
    name = re.sub(r"-{2,}", "-", re.sub(r"[^a-z0-9.-]+", "-", re.sub(r"\.{2,}", ".", name)))
    name = name[:60].strip("-.") or "imported"
    try:
        return check_name(name)
    except InvalidError:
        return "imported"
