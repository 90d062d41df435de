"""Taking one disk out of a package, into a qcow2 of our own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path

from undercroft.model.errors import HostileImageError
from undercroft.model.image import DiskFormat
from undercroft.storage.appliance.package import DiskSource
from undercroft.storage.appliance.tar import Member, plain_name, refused
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
from undercroft.storage.importing import UNTRUSTED
from undercroft.storage.process import Progress, run, share_of, tool
from undercroft.storage.streams.copy import copy_spans
from undercroft.storage.streams.maps import extents_map, map_of
from undercroft.storage.streams.vmdk_in import read_header, unpack_stream
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
    else:
        await _unpack(fd, source, members, work, half, progress)
    if await asyncio.to_thread(_size, half) < source.virtual_size:
        command = [tool("qemu-img", package="qemu-utils"), "resize", "-q", "-f", "qcow2"]
        await run([*command, str(half), str(source.virtual_size)])
    await in_thread(lambda _: _settle(half, target, source.virtual_size))


def _size(path: Path) -> int:
    """The size of the disk in a qcow2 of ours, in bytes."""
    with path.open("rb") as file:
        return int.from_bytes(file.read(32)[24:], "big")


async def _unpack(
    fd: int,
    source: DiskSource,
    members: Mapping[str, Member],
    work: Path,
    half: Path,
    progress: Progress,
) -> None:
    """Straight into ``half`` where we can read it ourselves, else with qemu-img's help."""
    if await in_thread(lambda stop: _read(fd, source, members, half, progress, stop)):
        return
    if source.extents:
        raise refused("a disk of it is in several files, of a kind that is not known here")
    await in_thread(
        lambda stop: _copy(fd, source, work / "source", share_of(progress, 0, 0.3), stop)
    )
    await _convert(work, "source", source, half, share_of(progress, 0.3, 1.0))


def _read(
    fd: int,
    source: DiskSource,
    members: Mapping[str, Member],
    half: Path,
    progress: Progress,
    stop: Stop,
) -> bool:
    """Whether it could be read without qemu-img."""
    image = Image(fd, source.size, source.offset)

    def member(name: str) -> Image:
        found = members[plain_name(name)]
        return Image(fd, found.size, found.offset)

    def report(done: float) -> None:
        progress(done, "unpacking the disk")

    stream = spans = None
    if source.extents:
        spans = extents_map(source.extents, member)
    else:
        stream = read_header(image) if source.format is DiskFormat.VMDK else None
        spans = map_of(image, source.format) if stream is None else None
    if stream is None and spans is None:
        return False
    directory = half.parent
    with disk_full_is_clear(_WHAT, directory):
        require_space(_WHAT, directory, 0)
        out = os.open(half, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            if stream is not None:
                unpack_stream(image, stream, out, directory, stop, report)
            elif spans is not None:
                copy_spans(fd, spans, source.virtual_size, out, directory, stop, report)
        finally:
            os.close(out)
    return True


def _copy(fd: int, source: DiskSource, target: Path, progress: Progress, stop: Stop) -> None:
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


async def _unpack_gzip(
    fd: int, source: DiskSource, work: Path, half: Path, progress: Progress
) -> None:
    """A disk that is compressed as a whole: it may become as large as the disk inside at most, and
    a little for the format."""
    packed, plain = work / "packed", work / "plain"
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
    descriptor = os.open(plain, os.O_RDONLY | os.O_CLOEXEC)
    try:
        inner = await asyncio.to_thread(_look, descriptor)
        if inner.virtual_size > source.virtual_size:
            raise refused("a disk of it is larger than its descriptor says")
        await _unpack(descriptor, inner, {}, work, half, share_of(progress, 0.5, 1.0))
    finally:
        os.close(descriptor)


def _look(descriptor: int) -> DiskSource:
    format = recognise(descriptor)
    found = inspect(descriptor, format, Limits())
    size = os.fstat(descriptor).st_size
    return DiskSource(0, size, format, found.virtual_size, found.data_size)


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
