"""How the disks of an imported VM come to be: from an upload, or from a file of this host.

The task begins anew with each disk that is not there yet, so a crash costs at most one. Nothing of
a file is trusted but what was checked in this very run: it may be another one by now.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from undercroft.host.datastores import driver, layer_file
from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.imaging import Progress, reported
from undercroft.host.layers import get_layer, head_layer, layer_is_made, make_layer, volume_status
from undercroft.host.outcome import TaskRun
from undercroft.host.uploads import upload_path
from undercroft.model.errors import (
    DataError,
    HostileImageError,
    InvalidError,
    NotFoundError,
    StaleError,
)
from undercroft.model.task import Task
from undercroft.model.transfer import ImportSource
from undercroft.model.vm import VM
from undercroft.model.volume import Volume, VolumeState
from undercroft.operations.services import Examined
from undercroft.storage.appliance.manifest import verify
from undercroft.storage.appliance.package import Package, open_package
from undercroft.storage.appliance.tar import refused
from undercroft.storage.appliance.unpack import unpack_disk
from undercroft.storage.files import allocated, disk_full_is_clear, sync_directory, write_durably
from undercroft.storage.importing import open_plain
from undercroft.storage.process import share_of
from undercroft.storage.threads import in_thread
from undercroft.store.interface import update

_NVRAM = "nvram.fd"
_MOST_NVRAM = 16 << 20


async def examine(environment: Environment, source: ImportSource) -> Examined:
    """What is in a file; see `undercroft.operations.services`."""
    try:
        async with _opened(environment, source) as (_, package):
            return Examined(appliance=package.appliance, image=package.image, arch=package.arch)
    except HostileImageError:
        if source.upload is not None:  # nobody wants it any more
            await asyncio.to_thread(upload_path(environment, source.upload).unlink, True)
        raise


async def make_disks(environment: Environment, vm: VM, run: TaskRun) -> None:
    """Makes the volumes of a VM from the file that its task names.

    Raises:
        HostileImageError: it is refused. ChecksumError: it is not what was announced.
        NoSpaceError: the disk is full. NotFoundError: it is gone.
    """
    arguments = run.arguments["import"]
    source = msgspec.convert(arguments["source"], ImportSource)
    async with _opened(environment, source) as (fd, package), reported(run) as progress:
        sizes = [disk.size for disk in package.appliance.disks]
        volumes = [await _volume(environment, disk.volume) for disk in vm.spec.disks]
        if sizes != [volume.spec.size for volume in volumes]:
            raise InvalidError("the file was changed meanwhile", action="import it again")
        # What was announced is compared while the disks are unpacked: two processors, two things.
        size = os.fstat(fd).st_size
        checking = asyncio.ensure_future(
            in_thread(
                lambda stop: verify(
                    fd, size, arguments.get("sha256"), package.members, package.checksums, stop
                )
            )
        )
        making = asyncio.ensure_future(_unpack(environment, fd, package, volumes, progress))
        try:
            await asyncio.wait({checking, making}, return_when=asyncio.FIRST_EXCEPTION)
            if checking.done():
                checking.result()
            await making
            progress(0.99, "comparing checksums")
            await checking
        finally:
            for work in (checking, making):
                work.cancel()
            await asyncio.wait({checking, making})
        if package.nvram is not None and arguments.get("nvram"):
            member = package.nvram
            if member.size > _MOST_NVRAM:
                raise refused(f"{member.name[:60]!r} is too large for what it is")
            data = await asyncio.to_thread(os.pread, fd, member.size, member.offset)
            await asyncio.to_thread(_keep, environment.vm_directory(vm.meta.id), data)
    for volume in volumes:
        head = await head_layer(environment, volume.meta.id)
        taken = await asyncio.to_thread(
            allocated, await layer_file(environment, await get_layer(environment, head))
        )
        await update(
            environment.store,
            Volume,
            volume.meta.id,
            lambda record, taken=taken: volume_status(  # type: ignore[misc]
                record, state=VolumeState.READY, allocated=taken
            ),
        )


async def _unpack(
    environment: Environment,
    fd: int,
    package: Package,
    volumes: list[Volume],
    progress: Progress,
) -> None:
    total = sum(volume.spec.size for volume in volumes) or 1
    done = 0
    for volume, source in zip(volumes, package.sources, strict=True):
        part = share_of(progress, done / total * 0.98, (done + volume.spec.size) / total * 0.98)
        done += volume.spec.size
        head = await head_layer(environment, volume.meta.id)
        path = await layer_file(environment, await get_layer(environment, head))
        if source is None:
            await make_layer(environment, head)
            continue
        if not path.exists():
            store = await driver(environment, volume.spec.datastore)
            work = store.half()
            try:
                await unpack_disk(fd, source, package.members, work, path, part)
            finally:
                await asyncio.shield(asyncio.to_thread(remove_tree, work))
        await layer_is_made(environment, head)


async def _volume(environment: Environment, id: str) -> Volume:
    found = await environment.store.get(Volume, id)
    if found is None:
        raise DataError(f"the record of volume {id} is gone", object=f"volume {id}")
    return found.record


def _keep(directory: Path, data: bytes) -> None:
    with disk_full_is_clear("firmware settings", directory):
        part = directory / f"{_NVRAM}.part"
        part.unlink(missing_ok=True)
        write_durably(part, data, 0o600)
        part.rename(directory / _NVRAM)
        sync_directory(directory)


@asynccontextmanager
async def _opened(
    environment: Environment, source: ImportSource
) -> AsyncIterator[tuple[int, Package]]:
    """The file, open, and what is in it."""
    path = Path(source.path) if source.path else upload_path(environment, str(source.upload))
    try:
        fd = await asyncio.to_thread(open_plain, path)
    except NotFoundError:
        if source.path is None:
            raise NotFoundError(
                f"there is no upload {str(source.upload)[:12]}", action="send it again"
            ) from None
        raise
    try:
        _check_stamp(fd, source)
        package = await asyncio.to_thread(
            open_package, fd, source.file, format=source.format, system=source.system
        )
        yield fd, package
    finally:
        os.close(fd)


def _check_stamp(fd: int, source: ImportSource) -> None:
    status = os.fstat(fd)
    found = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    if source.stamp is not None and source.stamp != found:
        raise StaleError(
            f"{source.path} is not the file that was meant, or was changed since",
            object=source.path,
            action="import it again",
        )


async def forget_upload(environment: Environment, run: TaskRun) -> None:
    """Removes the upload that an import has used up, unless another import needs it."""
    key = _upload_of(run.arguments)
    if key is not None and key not in await _used(environment):
        await asyncio.to_thread(upload_path(environment, key).unlink, True)


async def sweep_uploads(environment: Environment, before: float) -> None:
    """Removes what nobody has added to since ``before`` (seconds since 1970), and no import
    needs."""
    used = await _used(environment)

    def work() -> None:
        if environment.directory.uploads.is_dir():
            for path in environment.directory.uploads.iterdir():
                if path.name not in used and path.stat().st_mtime < before:
                    path.unlink(missing_ok=True)

    await asyncio.to_thread(work)


async def _used(environment: Environment) -> set[str]:
    """The uploads that imports under way need."""
    found = set()
    for item in (await environment.store.list(Task)).items:
        task = item.record
        key = _upload_of(task.spec.arguments)
        if key is not None and not task.status.state.final:
            found.add(key)
    return found


def _upload_of(arguments: Mapping[str, Any]) -> str | None:
    """The upload that a task needs: an import, or the restoring of a backup."""
    source: Mapping[str, Any] = (arguments.get("import") or {}).get("source", arguments)
    key = source.get("upload")
    return str(key) if key is not None else None
