"""Taking a disk image from a file: untrusted until it has become a qcow2 of our own."""

from __future__ import annotations

import asyncio
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from undercroft.model.errors import ChecksumError, InvalidError, NotFoundError
from undercroft.model.image import DiskFormat, ImageContent
from undercroft.storage.convert import convert
from undercroft.storage.files import (
    copy_sparse,
    disk_full_is_clear,
    hash_file,
    remove_tree,
    require_space,
)
from undercroft.storage.formats import Inspected, Limits, inspect, recognise
from undercroft.storage.images import ImageStore
from undercroft.storage.process import Identity, Progress, no_progress, share_of
from undercroft.storage.threads import Stop, in_thread

__all__ = ["UNTRUSTED", "ImportOptions", "import_image", "open_plain"]

UNTRUSTED = Identity(65534, 65534)
"""Whom qemu-img runs as when this process is root: nobody."""

_DISK = "disk.qcow2"


@dataclass(frozen=True)
class ImportOptions:
    """How to take an image.

    ``format`` None: by its magic number (never raw). ``sha256`` in hex is what the file must have.
    ``content`` is what is said about the image: its disk is filled in. With ``take`` the source is
    a file of ours that is used up, instead of copied. ``identity`` is used only by root.
    """

    format: DiskFormat | None = None
    sha256: str | None = None
    content: ImageContent = field(default_factory=lambda: ImageContent(cloud_init=True))
    limits: Limits = field(default_factory=Limits)
    take: bool = False
    identity: Identity = UNTRUSTED


async def import_image(
    store: ImageStore,
    source: Path,
    options: ImportOptions,
    progress: Progress = no_progress,
) -> tuple[str, ImageContent]:
    """Makes an image of a file: copied (so that nobody changes it meanwhile), checked, converted.

    Returns:
        The digest of the new image, and its content.

    Raises:
        NotFoundError, InvalidError: no such file; not a plain file; its format is not known.
        ChecksumError: not the file that was announced.
        HostileImageError: malformed, beyond a limit, or it refers to something outside of itself.
        NoSpaceError: it does not fit.
        MissingToolError: qemu-img is not installed.
    """
    work = store.new_directory()
    try:
        found = await in_thread(lambda stop: _receive(source, work, options, progress, stop))
        format, inspected = found
        made = work / "made"
        identity = options.identity if os.geteuid() == 0 else None
        await asyncio.to_thread(_hand_over, work, made, identity)
        # Both ends in one directory, which belongs to whom qemu-img runs as.
        await convert(
            made,
            "source",
            format,
            _DISK,
            data_size=inspected.data_size,
            identity=identity,
            progress=share_of(progress, 0.4, 0.85),
        )
        await asyncio.to_thread((made / "source").unlink)
        content = msgspec.structs.replace(
            options.content,
            disk=_DISK,
            disk_format=DiskFormat.QCOW2,
            virtual_size=inspected.virtual_size,
        )
        added = await store.add(made, content, share_of(progress, 0.85, 1.0))
        if options.take:
            await asyncio.to_thread(source.unlink, True)
        return added
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, work))


def _receive(
    source: Path, work: Path, options: ImportOptions, progress: Progress, stop: Stop
) -> tuple[DiskFormat, Inspected]:
    """Brings the source into ``work`` as ``source`` and inspects it there."""
    fd = open_plain(source)
    try:
        # A quick look before the copy, so that nonsense is refused without waiting for it.
        format = options.format or recognise(fd, name=source.name)
        inspected = inspect(fd, format, options.limits)
        status = os.fstat(fd)
        copying = 0 if options.take else min(status.st_blocks * 512, status.st_size)
        with disk_full_is_clear(f"importing {source.name}", work):
            require_space(f"importing {source.name}", work, copying + inspected.data_size)
            total = max(status.st_size, 1)
            part = share_of(progress, 0.0, 0.4)

            def report(done: int) -> None:
                part(done / total, "reading the image")

            target = work / "source"
            if options.take:
                os.link(source, target, follow_symlinks=False)
                checksum = hash_file(target, stop, report) if options.sha256 else None
            else:
                checksum = copy_sparse(fd, target, stop, report, limit=status.st_size)
    finally:
        os.close(fd)
    if options.sha256 is not None and checksum != options.sha256.lower():
        raise ChecksumError(
            f"{source.name} has SHA-256 {checksum}, not the announced {options.sha256}",
            object=str(source),
            action="fetch it again, and check where the announced value comes from",
        )
    fd = os.open(target, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        return format, inspect(fd, format, options.limits)
    finally:
        os.close(fd)


def open_plain(path: Path) -> int:
    """Opens a plain file (a FIFO or a device could block for ever, or never end).

    Raises:
        NotFoundError: there is none. InvalidError: it is something else, or cannot be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no file {path}", object=str(path)) from None
    except OSError as error:
        raise InvalidError(
            f"the file {path} cannot be read: {error.strerror}", object=str(path)
        ) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidError(f"{path} is not a plain file", object=str(path))
    return fd


def _hand_over(work: Path, made: Path, identity: Identity | None) -> None:
    """Moves the source to where it is converted, readable by whom that is done as."""
    made.mkdir(mode=0o700)
    source = made / "source"
    (work / "source").rename(source)
    if identity is not None:
        os.chown(source, 0, identity.gid)
        source.chmod(0o440)
        os.chown(made, identity.uid, identity.gid)
