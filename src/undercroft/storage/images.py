"""The image store: immutable directories named by the checksum of their manifest.

    IMAGES/<digest>/manifest.json    an `ImageContent`, with size and SHA-256 of every file
    IMAGES/<digest>/disk.qcow2 …     the files, read-only

A directory appears whole or not at all: it is made in the temporary directory, made durable, and
then renamed. The digest covers the manifest, and the manifest every file: so kernel, initrd, disk
and what is said about them cannot change without the name changing.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from undercroft.model.errors import DataCorruptError, InvalidError, NotFoundError
from undercroft.model.image import ImageContent, ImageFile
from undercroft.storage.files import (
    allocated,
    disk_full_is_clear,
    hash_file,
    remove_tree,
    sync_directory,
    sync_tree,
    write_durably,
)
from undercroft.storage.process import Progress, no_progress
from undercroft.storage.threads import Stop, in_thread

__all__ = ["MANIFEST", "ImageStore", "manifest_digest"]

MANIFEST = "manifest.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_MANIFEST = 1 << 20


def encode_manifest(content: ImageContent) -> bytes:
    """The manifest's one and only form: sorted, without spaces."""
    return msgspec.json.encode(content, order="sorted")


def manifest_digest(content: ImageContent) -> str:
    """The identity (64 hex digits) of an image with this content."""
    return hashlib.sha256(encode_manifest(content)).hexdigest()


class ImageStore:
    """Images in ``images``; half-made things in ``tmp``, on the same file system."""

    def __init__(self, images: Path, tmp: Path) -> None:
        self.images = images
        self.tmp = tmp

    def path(self, digest: str) -> Path:
        """The directory of an image, whether or not it is there.

        Raises:
            InvalidError: not a digest (so no path can lead elsewhere).
        """
        if _DIGEST.fullmatch(digest) is None:
            raise InvalidError(f"{digest[:80]!r} is not the digest of an image")
        return self.images / digest

    def new_directory(self) -> Path:
        """A fresh directory in which to make an image; whoever asked removes what is left of it.

        Raises:
            NoSpaceError: the disk is full.
        """
        path = self.tmp / f"image-{secrets.token_hex(8)}"
        with disk_full_is_clear("a new image", self.tmp):
            path.mkdir(mode=0o711, parents=True)
        return path

    async def add(
        self, directory: Path, content: ImageContent, progress: Progress = no_progress
    ) -> tuple[str, ImageContent]:
        """Takes the files in ``directory`` (below ``tmp``) as a new image; the directory is moved.

        Adding the same content again gives the same digest and changes nothing.

        Returns:
            The digest, and the content with its ``files`` filled in.

        Raises:
            InvalidError: the content names a file that is not there, or a name is not allowed.
            NoSpaceError: the disk is full.
        """

        def work(stop: Stop) -> tuple[str, ImageContent]:
            with disk_full_is_clear("the image", self.tmp):
                return self._add(directory, content, progress, stop)

        return await in_thread(work)

    def _add(
        self, directory: Path, content: ImageContent, progress: Progress, stop: Stop
    ) -> tuple[str, ImageContent]:
        found = _list_files(directory)
        for name in (content.disk, content.kernel, content.initrd):
            if name is not None and name not in found:
                raise InvalidError(f"the image has no file {name!r}")
        total = sum(found.values()) or 1
        done = 0
        files: dict[str, ImageFile] = {}
        for name, size in sorted(found.items()):
            path = directory / name
            report = _reporter(progress, done, total, "checking the image")
            checksum = hash_file(path, stop, report)
            files[name] = ImageFile(size=size, sha256=checksum)
            path.chmod(0o444)
            done += size
        content = msgspec.structs.replace(content, files=files)
        digest = manifest_digest(content)
        write_durably(directory / MANIFEST, encode_manifest(content), 0o444)
        if os.geteuid() == 0:
            for path in (directory, *directory.iterdir()):
                os.chown(path, 0, 0)
        directory.chmod(0o711)
        sync_tree(directory)
        stop.check()
        target = self.path(digest)
        if not target.exists():
            self.images.mkdir(parents=True, exist_ok=True)
            directory.rename(target)
            sync_directory(self.images)
        else:
            remove_tree(directory)
        return digest, content

    async def load(self, digest: str) -> ImageContent:
        """What an image is, by its manifest.

        Raises:
            NotFoundError: there is no such image.
            DataCorruptError: its manifest is not the one it was made with.
        """
        return await asyncio.to_thread(self._load, digest)

    def _load(self, digest: str) -> ImageContent:
        try:
            with (self.path(digest) / MANIFEST).open("rb") as file:
                data = file.read(_MAX_MANIFEST)
        except (FileNotFoundError, NotADirectoryError):
            raise NotFoundError(
                f"the content of image {digest[:12]} is not on this host",
                object=digest,
                action="build or import it again",
            ) from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise _damaged(digest, "its manifest was changed")
        try:
            return msgspec.json.decode(data, type=ImageContent)
        except msgspec.DecodeError as error:
            raise _damaged(digest, f"its manifest cannot be read ({error})") from error

    async def verify(
        self, digest: str, progress: Progress = no_progress, *, content: bool = True
    ) -> ImageContent:
        """Checks that an image is as it was made: sizes, and unless ``content`` is false all bytes.

        Raises:
            NotFoundError: there is no such image.
            DataCorruptError: something is missing or was changed.
        """
        return await in_thread(lambda stop: self._verify(digest, progress, content, stop))

    def _verify(self, digest: str, progress: Progress, deep: bool, stop: Stop) -> ImageContent:
        content = self._load(digest)
        directory = self.path(digest)
        total = sum(file.size for file in content.files.values()) or 1
        done = 0
        for name, file in content.files.items():
            path = directory / name
            try:
                if path.is_symlink() or path.stat().st_size != file.size:
                    raise _damaged(digest, f"{name} has another size than it was made with")
                report = _reporter(progress, done, total, "verifying")
                if deep and hash_file(path, stop, report) != file.sha256:
                    raise _damaged(digest, f"{name} was changed")
            except FileNotFoundError:
                raise _damaged(digest, f"{name} is missing") from None
            done += file.size
        return content

    async def remove(self, digest: str) -> None:
        """Removes an image, at once even if that is interrupted; nothing happens if it is gone."""
        path = self.path(digest)
        grave = self.tmp / f"removed-{secrets.token_hex(8)}"

        def work() -> None:
            try:
                path.rename(grave)
            except FileNotFoundError:
                return
            sync_directory(self.images)
            remove_tree(grave)

        await asyncio.to_thread(work)

    async def usage(self, digest: str) -> int:
        """Bytes that an image takes on the disk.

        Raises:
            NotFoundError: there is no such image.
        """
        try:
            return await asyncio.to_thread(allocated, self.path(digest))
        except FileNotFoundError:
            raise NotFoundError(f"there is no image {digest[:12]}", object=digest) from None

    async def digests(self) -> list[str]:
        """The digests of all images that are there."""
        names = await asyncio.to_thread(lambda: [path.name for path in _children(self.images)])
        return sorted(name for name in names if _DIGEST.fullmatch(name))

    async def orphans(self, known: set[str]) -> list[Path]:
        """What lies in the directory of images without being one of the ``known`` (digests)."""
        return await asyncio.to_thread(
            lambda: sorted(path for path in _children(self.images) if path.name not in known)
        )


def _reporter(progress: Progress, before: int, total: int, phase: str) -> Callable[[int], None]:
    """Reports progress within one of several files; ``before`` bytes came ahead of it."""
    return lambda done: progress((before + done) / total, phase)


def _children(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _list_files(directory: Path) -> dict[str, int]:
    """Sizes by name; an image is a flat directory of plain files."""
    found = {}
    for entry in os.scandir(directory):
        if not entry.is_file(follow_symlinks=False) or _FILE_NAME.fullmatch(entry.name) is None:
            raise InvalidError(f"{entry.name[:80]!r} cannot be part of an image")
        if entry.name == MANIFEST:
            raise InvalidError(f"an image cannot bring its own {MANIFEST}")
        found[entry.name] = entry.stat(follow_symlinks=False).st_size
    if not found:
        raise InvalidError("an image without any file")
    return found


def _damaged(digest: str, reason: str) -> DataCorruptError:
    return DataCorruptError(
        f"image {digest[:12]} is damaged: {reason}",
        object=digest,
        action="remove it, then build or import it again; VMs made from it may be affected",
    )
