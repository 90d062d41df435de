"""The directory driver: files in a directory of this host, on whatever is mounted there."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from undercroft.model.errors import AlreadyExistsError, DataError, UnavailableError
from undercroft.storage.datastores.interface import Space
from undercroft.storage.files import (
    disk_full_is_clear,
    sync_directory,
    whole_space,
    write_durably,
)
from undercroft.storage.reflink import can_reflink, copy_file
from undercroft.storage.threads import in_thread
from undercroft.storage.volumes import LayerFile, copy_chain, create_volume

__all__ = ["MARKER", "DirectoryDriver", "forget", "prepare"]

MARKER = ".undercroft-datastore"
HALF = ".half"
_FORMATS = (".qcow2", ".raw")
_OURS = re.compile(r"layer-[0-9a-z]+\.(?:qcow2|raw)")  # somebody may put other files there, too


class DirectoryDriver:
    """A directory. ``id``: what its marker must say, so that an empty mount point is not taken for
    it; None for the one in the data directory. ``tmp``: where halves are, on the same file
    system."""

    def __init__(self, path: Path, tmp: Path, id: str | None, label: str) -> None:
        self._path = path
        self._tmp = tmp
        self._id = id
        self._label = label

    async def check(self) -> None:
        """Raises `UnavailableError` if the marker is not there, or another's."""
        if self._id is not None and await asyncio.to_thread(read_marker, self._path) != self._id:
            raise UnavailableError(
                f"{self._label} is not at {self._path}: its file system is not mounted there, "
                "or the directory was emptied",
                object=self._label,
                action=f"mount it at {self._path}, then try again",
            )

    def path(self, name: str) -> Path:
        """Where the file is."""
        return self._path / name

    async def make(
        self,
        name: str,
        size: int,
        *,
        format: str = "qcow2",
        base: tuple[Path, str] | None = None,
        preallocate: bool = False,
        key: Path | None = None,
        progress: Callable[[float], None] | None = None,
        marks: Sequence[str] = (),
    ) -> None:
        """See `Driver.make`."""
        await self.check()
        await create_volume(
            self.path(name),
            size,
            base=base,
            tmp=self._tmp,
            format=format,
            preallocate=preallocate,
            key=key,
            progress=progress,
            marks=marks,
        )

    def half(self) -> Path:
        """See `Driver.half`."""
        return self._tmp / f"half-{secrets.token_hex(8)}"

    async def adopt(self, half: Path, name: str) -> None:
        """See `Driver.adopt`."""
        await self.check()
        await asyncio.to_thread(half.rename, self.path(name))
        await asyncio.to_thread(sync_directory, self._path)

    async def copy(
        self,
        chain: Sequence[LayerFile],
        name: str,
        size: int,
        *,
        whole: bool = False,
        key: Path | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """See `Driver.copy`."""
        await self.check()
        target = self.path(name)
        if not whole:
            await copy_chain(
                chain,
                target,
                size,
                tmp=self._tmp,
                key=key,
                progress=progress,
            )
            return
        half = self.half()
        try:
            with disk_full_is_clear("the copy", self._path):
                await in_thread(lambda stop: copy_file(chain[0].path, half, stop, progress))
                await asyncio.to_thread(half.rename, target)
                await asyncio.to_thread(sync_directory, self._path)
        finally:
            half.unlink(missing_ok=True)

    async def remove(self, name: str) -> None:
        """See `Driver.remove`."""
        await self.check()
        await asyncio.to_thread(_unlink, self.path(name))

    async def names(self) -> list[str]:
        """See `Driver.names`."""
        await self.check()
        found = await asyncio.to_thread(os.listdir, self._path)
        return sorted(name for name in found if _OURS.fullmatch(name))

    async def space(self) -> Space:
        """See `Driver.space`."""
        await self.check()
        capacity, free = await asyncio.to_thread(whole_space, self._path)
        return Space(capacity=capacity, free=free)


def read_marker(path: Path) -> str | None:
    """The id of the datastore that a directory is; None: of none. Blocks."""
    return _read_marker(path).get("id")


def _read_marker(path: Path) -> dict[str, str]:
    try:
        with (path / MARKER).open("rb") as file:
            said = json.loads(file.read(4096))
    except (OSError, ValueError):
        return {}
    return {key: str(value) for key, value in said.items()} if isinstance(said, dict) else {}


def sweep(path: Path, id: str) -> None:
    """Removes what a daemon that died left half-made. Blocks."""
    if read_marker(path) == id:
        with contextlib.suppress(OSError):
            _empty(path / HALF)


def prepare(path: Path, id: str, owner: str, known: Callable[[str], bool]) -> bool:
    """Makes a directory the datastore ``id``, with a marker; whether files can be copied there by
    sharing their blocks. ``owner`` is the id of this host, ``known`` tells whether an id is that of
    a datastore that exists. Blocks.

    Raises:
        AlreadyExistsError: it is another datastore.
        DataError: it cannot be made or written to.
    """
    try:
        path.mkdir(mode=0o711, parents=True, exist_ok=True)
        marked = _read_marker(path)
        if known(marked.get("id", "")):
            raise AlreadyExistsError(
                f"{path} is a datastore already", object=str(path), action="choose another path"
            )
        if marked and marked.get("owner") != owner:
            raise AlreadyExistsError(
                f"{path} is a datastore of another installation",
                object=str(path),
                action=f"choose another path; if that one is gone, remove {path / MARKER}",
            )
        if any(name.endswith(_FORMATS) for name in os.listdir(path)):
            raise DataError(
                f"{path} has disks in it that are none of ours",
                object=str(path),
                action="choose an empty directory",
            )
        (path / HALF).mkdir(mode=0o700, exist_ok=True)
        _empty(path / HALF)
        half = path / f"{MARKER}.half"
        half.unlink(missing_ok=True)
        with disk_full_is_clear("the datastore", path):
            write_durably(half, json.dumps({"id": id, "owner": owner}).encode())
        half.rename(path / MARKER)
        sync_directory(path)
        return can_reflink(path / HALF)
    except OSError as error:
        raise DataError(
            f"{path} cannot be a datastore: {error.strerror}",
            object=str(path),
            action="choose a directory that the daemon can write to",
        ) from error


def forget(path: Path, id: str) -> None:
    """Makes a directory no datastore any more. Blocks."""
    if read_marker(path) != id:
        return
    sweep(path, id)
    with contextlib.suppress(OSError):
        (path / HALF).rmdir()
    with contextlib.suppress(OSError):
        (path / MARKER).unlink()


def _empty(directory: Path) -> None:
    for left in directory.iterdir():
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()


def _unlink(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(FileNotFoundError):
        sync_directory(path.parent)
