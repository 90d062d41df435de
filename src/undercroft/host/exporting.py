"""How exports come to be: the frozen disks of a passing template, written as files."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.imaging import Progress, reported
from undercroft.host.layers import plan_layers
from undercroft.host.outcome import TaskRun
from undercroft.host.templates import wait_for
from undercroft.model.errors import DataError
from undercroft.model.export import Export, ExportFile, ExportFormat, VmdkKind
from undercroft.model.image import Image
from undercroft.model.template import Template
from undercroft.model.vm import DiskBus, Firmware, Machine, VMSpec
from undercroft.storage.appliance.descriptor import (
    OutDisk,
    OutMachine,
    OutPort,
    write_descriptor,
)
from undercroft.storage.appliance.manifest import write_manifest
from undercroft.storage.appliance.tar import BLOCK, header, padding
from undercroft.storage.convert import convert_out
from undercroft.storage.files import (
    disk_full_is_clear,
    hash_file,
    require_space,
    sync_directory,
)
from undercroft.storage.process import share_of
from undercroft.storage.streams.extents import ChainLayer, data_pieces, opened
from undercroft.storage.streams.vmdk_out import write_stream
from undercroft.storage.threads import Stop, in_thread

_CHECK_EVERY = 64 << 20  # bytes of disk between two looks at the room that is left
_NVRAM = "nvram.fd"
_MOST_NVRAM = 16 << 20


@dataclass(frozen=True)
class _Disk:
    """A disk to write: its chain, its size in bytes, its bus, the name of its file."""

    layers: Sequence[ChainLayer]
    size: int
    bus: DiskBus
    file: str


@dataclass(frozen=True)
class MadeExport:
    """What was made."""

    files: tuple[ExportFile, ...]
    notes: tuple[str, ...]


async def make_export(environment: Environment, export: Export, run: TaskRun) -> MadeExport:
    """Writes the files of an export, into a directory of their own; begins anew if there is one.

    Raises:
        NoSpaceError: the disk is full. DataError: what is to be exported is gone.
        UndercroftError: it could not be frozen, or read.
    """
    waits = run.arguments.get("waits")
    template = await wait_for(
        environment, export.spec.template, str(waits) if waits is not None else None
    )
    shape = template.status.shape
    if shape is None:
        raise DataError(f"{template.label} is not whole", object=export.spec.source)
    directory = environment.directory.export(export.meta.id)
    await asyncio.to_thread(_begin, directory)
    disks = await _disks(environment, export, template)
    async with reported(run) as progress:
        part = share_of(progress, 0.0, 0.95)
        if export.spec.format.whole:
            machine, nvram, notes = await _machine(environment, export, template, shape, run)
            names = await in_thread(
                lambda stop: _write_whole(directory, export, disks, machine, nvram, part, stop)
            )
        else:
            notes = []
            names = await _write_disk(directory, export, disks[export.spec.disk], part)
        progress(0.95, "checksums")
        summed = names if export.spec.checksums else []
        sums = await asyncio.gather(
            *(in_thread(lambda stop, n=name: hash_file(directory / n, stop)) for name in summed),  # type: ignore[misc]
            in_thread(lambda _: _settle(directory, names)),
        )
    files = tuple(
        ExportFile(
            name=name,
            size=(directory / name).stat().st_size,
            sha256=str(sum),
            path=str(directory / name),
        )
        for name, sum in zip(names, sums[:-1] or [""] * len(names), strict=True)
    )
    return MadeExport(files=files, notes=tuple(notes))


def _begin(directory: Path) -> None:
    remove_tree(directory)
    with disk_full_is_clear("the export", directory.parent):
        directory.mkdir(mode=0o700, parents=True)


def _settle(directory: Path, names: Sequence[str]) -> None:
    with disk_full_is_clear("the export", directory):
        for name in names:
            fd = os.open(directory / name, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        sync_directory(directory)


async def _disks(environment: Environment, export: Export, template: Template) -> list[_Disk]:
    found = []
    for index, disk in enumerate(template.status.disks):
        planned = await plan_layers(environment, disk.layer, index)
        found.append(
            _Disk(
                layers=[ChainLayer(Path(layer.path), layer.format.value) for layer in planned],
                size=disk.size,
                bus=disk.disk.bus,
                file=f"{export.spec.file}-disk{index + 1}.vmdk",
            )
        )
    return found


async def _machine(
    environment: Environment, export: Export, template: Template, shape: VMSpec, run: TaskRun
) -> tuple[OutMachine, bytes | None, list[str]]:
    """What the descriptor says but for the disks, the firmware's settings, and what is left out."""
    notes: list[str] = []
    nvram: bytes | None = None
    if shape.firmware is Firmware.UEFI:
        besides = run.arguments.get("besides")
        directory = (
            environment.data / str(besides)
            if besides
            else environment.template_directory(template.meta.id)
        )
        nvram = await asyncio.to_thread(_small, directory / _NVRAM)
    image: str | None = None
    firmware = shape.firmware
    if shape.firmware is Firmware.KERNEL and shape.image is not None:
        found = await environment.store.get(Image, shape.image)
        image = found.record.status.digest if found is not None else None
        firmware, note = boots_elsewhere(shape, found.record if found is not None else None)
        notes.append(note)
    if shape.tpm:
        notes.append("its TPM begins anew elsewhere: secrets of a TPM do not leave the host")
    if any(drive.medium for drive in shape.cdroms):
        notes.append("what is in its CD-ROM drives does not go with it")
    if any(port.forwards for port in shape.ports):
        notes.append("ports that are forwarded to it do not go with it")
    machine = OutMachine(
        name=export.spec.source.partition(" ")[2],
        id=export.spec.file,
        cpus=shape.cpus,
        memory=shape.memory,
        arch=shape.arch,
        firmware=firmware,
        secure_boot=shape.secure_boot,
        tpm=shape.tpm,
        disks=(),
        cdroms=[drive.bus for drive in shape.cdroms],
        ports=[OutPort(port.mode, port.model, port.mac) for port in shape.ports],
        image=image,
    )
    return machine, nvram, notes


def boots_elsewhere(shape: VMSpec, image: Image | None) -> tuple[Firmware, str]:
    """What a VM that boots its image's kernel boots by where that is not, and what to say of it."""
    name = image.meta.name if image is not None else "?"
    kernel = f"it boots the kernel of image {name}, which does not go with it"
    content = image.status.content if image is not None else None
    if content is None:
        return Firmware.KERNEL, kernel
    if content.disk is None:
        return Firmware.KERNEL, f"{kernel}: it will not boot elsewhere"
    firmware = Firmware.UEFI if shape.machine is Machine.VIRT else Firmware.BIOS
    loader = f"its own boot loader ({firmware.upper()})"
    return firmware, f"it boots the kernel of image {name}; elsewhere it boots by {loader}"


def _small(path: Path) -> bytes | None:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_NVRAM)
    except FileNotFoundError:  # it never ran
        return None


def _write_whole(
    directory: Path,
    export: Export,
    disks: Sequence[_Disk],
    machine: OutMachine,
    nvram: bytes | None,
    progress: Progress,
    stop: Stop,
) -> list[str]:
    """Writes descriptor, manifest, disks and firmware's settings; returns the names of the files.

    In an OVA the first two come first, but are known last. Room is kept for the longest that the
    descriptor can become, and filled up with line ends.
    """
    stem = export.spec.file
    packed = export.spec.format is ExportFormat.OVA
    heads = [f"{stem}.ovf", f"{stem}.mf"]
    extra = [(f"{stem}.nvram", nvram)] if nvram is not None else []
    settings = (extra[0][0], len(extra[0][1])) if extra else None
    wide = [OutDisk(disk.file, 0, disk.size, disk.bus).widest() for disk in disks]
    room = len(write_descriptor(_with(machine, wide, settings)))
    names = [heads[0], *(disk.file for disk in disks), *(name for name, _ in extra)]
    manifest_size = len(write_manifest(dict.fromkeys(names, "0" * 64)))
    total = sum(disk.size for disk in disks)
    with disk_full_is_clear("the export", directory):
        require_space("the export", directory, 0)
        ova = _create(directory / f"{stem}.ova") if packed else -1
        at = 2 * BLOCK + room + padding(room) + manifest_size + padding(manifest_size)
        sums: dict[str, str] = {heads[0]: ""}
        written: list[OutDisk] = []
        done = 0
        try:
            for disk in disks:
                fd = ova if packed else _create(directory / disk.file)
                try:
                    start = at + BLOCK if packed else 0
                    report = _reporter(directory, progress, done, total)
                    size, sums[disk.file] = _write_disk_stream(fd, start, disk, report, stop)
                finally:
                    if not packed:
                        os.close(fd)
                if packed:
                    _put(ova, at, header(disk.file, size))
                    at = start + size + padding(size)
                written.append(OutDisk(disk.file, size, disk.size, disk.bus))
                done += disk.size
            for name, content in extra:
                sums[name] = hashlib.sha256(content).hexdigest()
                if packed:
                    _put(ova, at, header(name, len(content)) + content)
                    at += BLOCK + len(content) + padding(len(content))
                else:
                    (directory / name).write_bytes(content)
            text = write_descriptor(_with(machine, written, settings))
            text = text.ljust(room, b"\n")
            sums[heads[0]] = hashlib.sha256(text).hexdigest()
            manifest = write_manifest(sums)
            if not packed:
                (directory / heads[0]).write_bytes(text)
                (directory / heads[1]).write_bytes(manifest)
                return [*heads, *names[1:]]
            lead = header(heads[0], room) + text + bytes(padding(room))
            lead += header(heads[1], manifest_size) + manifest + bytes(padding(manifest_size))
            _put(ova, 0, lead)
            os.ftruncate(ova, at + 2 * BLOCK)
            return [f"{stem}.ova"]
        finally:
            if packed:
                os.close(ova)


def _with(
    machine: OutMachine, disks: Sequence[OutDisk], nvram: tuple[str, int] | None
) -> OutMachine:
    return dataclasses.replace(machine, disks=disks, nvram=nvram)


def _write_disk_stream(
    fd: int, at: int, disk: _Disk, report: Callable[[int], None], stop: Stop
) -> tuple[int, str]:
    """Writes a disk as a stream; its size and checksum."""
    digest = hashlib.sha256()
    with opened(disk.layers) as sources:
        size = write_stream(
            fd,
            at,
            disk.size,
            data_pieces(disk.layers, disk.size, stop),
            sources,
            digest,
            stop,
            report,
            cid=zlib.crc32(disk.file.encode()),
        )
    return size, digest.hexdigest()


def _reporter(
    directory: Path, progress: Progress, before: int, total: int
) -> Callable[[int], None]:
    checked = 0

    def report(done: int) -> None:
        nonlocal checked
        progress((before + done) / max(total, 1), "compressing the disks")
        if done - checked >= _CHECK_EVERY:
            require_space("the export", directory, 0)
            checked = done

    return report


def _create(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _put(fd: int, at: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view, at = view[written:], at + written


async def _write_disk(
    directory: Path, export: Export, disk: _Disk, progress: Progress
) -> list[str]:
    """Writes one disk in the format asked for; the names of its files."""
    spec = export.spec
    name = f"{spec.file}.{'vhd' if spec.format is ExportFormat.VHD else spec.format}"
    if spec.format is ExportFormat.VMDK and spec.vmdk is VmdkKind.STREAM:

        def work(stop: Stop) -> None:
            with disk_full_is_clear("the export", directory):
                require_space("the export", directory, 0)
                fd = _create(directory / name)
                try:
                    report = _reporter(directory, progress, 0, disk.size)
                    _write_disk_stream(fd, 0, disk, report, stop)
                finally:
                    os.close(fd)

        await in_thread(work)
        return [name]
    options = {
        ExportFormat.RAW: ("raw", ""),
        ExportFormat.QCOW2: ("qcow2", "compat=1.1"),
        ExportFormat.VMDK: ("vmdk", f"subformat={spec.vmdk}"),
        ExportFormat.VHD: ("vpc", "subformat=dynamic,force_size=on"),
        ExportFormat.VHDX: ("vhdx", "subformat=dynamic"),
        ExportFormat.VDI: ("vdi", ""),
    }[spec.format]
    await convert_out(disk.layers, directory / name, *options, progress=progress)
    if spec.format is ExportFormat.VMDK and spec.vmdk is VmdkKind.FLAT:
        return [name, f"{spec.file}-flat.vmdk"]
    return [name]
