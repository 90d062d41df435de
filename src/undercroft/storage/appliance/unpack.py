"""Taking one disk out of a package, into a qcow2 of our own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from undercroft.model.errors import HostileImageError
from undercroft.model.image import DiskFormat
from undercroft.storage.appliance.package import DiskSource
from undercroft.storage.appliance.tar import Member, refused
from undercroft.storage.convert import convert
from undercroft.storage.decompress import decompress
from undercroft.storage.files import (
    copy_sparse,
    disk_full_is_clear,
    require_space,
    sync_directory,
)
from undercroft.storage.formats import Limits, inspect, recognise
from undercroft.storage.formats.common import Image
from undercroft.storage.formats.vmdk_extents import own_descriptor
from undercroft.storage.importing import UNTRUSTED
from undercroft.storage.process import Progress, run, share_of, tool
from undercroft.storage.streams.vmdk_in import StreamHeader, read_header, unpack_stream
from undercroft.storage.threads import Stop, in_thread

__all__ = ["unpack_disk"]

_WHAT = "importing the disk"


async def unpack_disk(
    fd: int,
    source: DiskSource,
    members: Mapping[str, Member],
    work: Path,
    target: Path,
    progress: Progress,
) -> None:
    """Makes ``target``, whole or not at all, of a disk in the open file ``fd``. ``work``: a
    directory to make, for what is needed on the way; the caller removes it.

    Raises:
        HostileImageError: it is malformed or truncated, or not what was said of it.
        NoSpaceError: it does not fit.
    """
    with disk_full_is_clear(_WHAT, target.parent):
        work.mkdir(mode=0o711)
    half = work / "half.qcow2"
    if source.packed:
        await _unpack_gzip(fd, source, work, half, progress)
    elif source.extents:
        await _unpack_extents(fd, source, members, work, half, progress)
    else:
        header = None
        if source.format is DiskFormat.VMDK:
            header = read_header(Image(fd, source.size, source.offset))
        if header is not None:
            await in_thread(lambda stop: _unpack_stream(fd, source, header, half, progress, stop))
        else:
            part = share_of(progress, 0.0, 0.3)
            await in_thread(lambda stop: _copy(fd, source, work / "source", part, stop))
            await _convert(work, "source", source, half, share_of(progress, 0.3, 1.0))
    if await asyncio.to_thread(_size, half) < source.virtual_size:
        command = [tool("qemu-img", package="qemu-utils"), "resize", "-q", "-f", "qcow2"]
        await run([*command, str(half), str(source.virtual_size)])
    await in_thread(lambda _: _settle(half, target, source.virtual_size))


def _size(path: Path) -> int:
    """The size of the disk in a qcow2 of ours, in bytes."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(32)[24:], "big")


def _unpack_stream(
    fd: int, source: DiskSource, header: StreamHeader, half: Path, progress: Progress, stop: Stop
) -> None:
    with disk_full_is_clear(_WHAT, half.parent):
        require_space(_WHAT, half.parent, 0)
        out = os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            image = Image(fd, source.size, source.offset)
            unpack_stream(
                image, header, out, half.parent, stop,
                lambda done: progress(done, "unpacking the disk"),
            )  # fmt: skip
        finally:
            os.close(out)


def _copy(
    fd: int, source: DiskSource | Member, target: Path, progress: Progress, stop: Stop
) -> None:
    with disk_full_is_clear(_WHAT, target.parent):
        copy_sparse(
            fd,
            target,
            stop,
            lambda done: progress(done / max(source.size, 1), "reading the disk"),
            limit=source.size,
            start=source.offset,
        )


async def _convert(
    work: Path, name: str, source: DiskSource, half: Path, progress: Progress
) -> None:
    """Has qemu-img, as nobody in particular, make a qcow2 of files in ``work``."""
    identity = UNTRUSTED if os.geteuid() == 0 else None
    made = work / "made"

    def hand_over() -> None:
        made.mkdir(mode=0o700)
        for path in [path for path in work.iterdir() if path != made]:
            moved = path.rename(made / path.name)
            if identity is not None:
                os.chown(moved, 0, identity.gid)
                moved.chmod(0o440)
        if identity is not None:
            os.chown(made, identity.uid, identity.gid)

    await asyncio.to_thread(hand_over)
    await convert(
        made,
        name,
        source.format,
        half.name,
        data_size=source.data_size,
        identity=identity,
        progress=progress,
    )

    def take_back() -> None:
        moved = (made / half.name).rename(half)
        if identity is not None:
            os.chown(moved, 0, 0)
        # Whoever had the better of qemu-img would have written this, too.
        descriptor = os.open(moved, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            inspect(descriptor, DiskFormat.QCOW2, Limits())
        finally:
            os.close(descriptor)

    await asyncio.to_thread(take_back)


async def _unpack_extents(
    fd: int,
    source: DiskSource,
    members: Mapping[str, Member],
    work: Path,
    half: Path,
    progress: Progress,
) -> None:
    """A disk in several files: each by a name of ours, with a descriptor of ours."""
    names: dict[str, str] = {}
    for extent in source.extents:
        if extent.file and extent.file not in names:
            names[extent.file] = f"extent{len(names)}"

    def copy_all(stop: Stop) -> None:
        for number, (file, name) in enumerate(names.items()):
            part = share_of(progress, 0.3 * number / len(names), 0.3 * (number + 1) / len(names))
            _copy(fd, members[file.removeprefix("./")], work / name, part, stop)

    await in_thread(copy_all)
    text = own_descriptor(source.extents, [names.get(e.file, "") for e in source.extents])
    await asyncio.to_thread((work / "descriptor.vmdk").write_bytes, text)
    await _convert(work, "descriptor.vmdk", source, half, share_of(progress, 0.3, 1.0))


async def _unpack_gzip(
    fd: int, source: DiskSource, work: Path, half: Path, progress: Progress
) -> None:
    """A disk that is compressed as a whole: it may become as large as the disk inside at most, and
    a little for the format."""
    packed, plain = work / "packed", work / "source"
    await in_thread(lambda stop: _copy(fd, source, packed, share_of(progress, 0, 0.1), stop))
    limit = source.virtual_size + source.virtual_size // 64 + (64 << 20)
    await decompress(
        packed,
        plain,
        ".gz",
        limit=limit,
        identity=UNTRUSTED,
        progress=share_of(progress, 0.1, 0.5),
    )
    await asyncio.to_thread(packed.unlink)

    def look() -> DiskSource:
        descriptor = os.open(plain, os.O_RDONLY)
        try:
            format = recognise(descriptor)
            found = inspect(descriptor, format, Limits())
            size = os.fstat(descriptor).st_size
            return DiskSource(0, size, format, found.virtual_size, found.data_size)
        finally:
            os.close(descriptor)

    inner = await asyncio.to_thread(look)
    if inner.virtual_size > source.virtual_size:
        raise refused("a disk of it is larger than its descriptor says")
    await _convert(work, "source", inner, half, share_of(progress, 0.5, 1.0))


def _settle(half: Path, target: Path, size: int) -> None:
    """Makes a finished file durable under its name, if it is what was announced."""
    descriptor = os.open(half, os.O_RDONLY | os.O_NOFOLLOW)
    with disk_full_is_clear(_WHAT, target.parent):
        try:
            if _size(half) != size:
                raise HostileImageError("the disk is not as large as it was said to be")
            half.chmod(0o600)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        half.rename(target)
        sync_directory(target.parent)
