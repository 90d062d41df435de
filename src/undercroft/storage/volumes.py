"""Volumes: qcow2 files, alone or as an overlay over an image's disk."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from undercroft.model.base import Model
from undercroft.model.errors import DataCorruptError, DataError, NoSpaceError, ProgramError
from undercroft.model.units import format_size
from undercroft.storage.files import require_space
from undercroft.storage.formats.empty import write_empty
from undercroft.storage.keys import read_key
from undercroft.storage.process import run, tool
from undercroft.storage.threads import in_thread

__all__ = [
    "LayerFile",
    "VolumeInfo",
    "check_volume",
    "copy_chain",
    "create_volume",
    "resize_volume",
    "volume_info",
]

_CREATE_TIMEOUT = 60.0
_COPY_TIMEOUT = 24 * 3600.0
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")
_CHECK_TIMEOUT = 3600.0
_SLACK = 4 << 20  # bytes that an empty qcow2 file may take, with room for its directory
_OVERHEAD = 4096  # at most one byte of tables for so many bytes of a disk


class LayerFile(NamedTuple):
    """A file of a chain. ``key``: the path of the key that it is encrypted with."""

    path: Path
    format: str = "qcow2"
    key: Path | None = None


class VolumeInfo(Model, frozen=True, kw_only=True):
    """``virtual_size`` as the guest sees it, ``allocated`` as the host does; in bytes."""

    virtual_size: int
    allocated: int


async def create_volume(
    path: Path,
    size: int,
    *,
    base: tuple[Path, str] | None = None,
    tmp: Path,
    format: str = "qcow2",
    preallocate: bool = False,
    key: Path | None = None,
    progress: Callable[[float], None] | None = None,
    marks: Sequence[str] = (),
) -> None:
    """Makes a volume of ``size`` bytes at ``path``; made in ``tmp`` and then moved, so that it is
    there whole or not at all.

    ``base`` is an image's disk and its format, which the volume overlays. Its name in the header is
    for people only: QEMU is told the chain, and never follows the header. With ``preallocate`` the
    file has all of its room from the beginning, and, as with ``format`` raw, a copy of the
    ``base``. With a ``key`` (the path of one) it is encrypted, and a qcow2 one. ``marks`` are the
    names of bitmaps in which QEMU notes what is written.

    Raises:
        NoSpaceError: the host's disk is full.
        DataError: there is no such base.
        ProgramError: qemu-img failed.
    """
    half = tmp / f"volume-{secrets.token_hex(8)}"
    if base is not None and not base[0].exists():
        raise DataError(f"{base[0]} is gone, which a disk is to lie on", object=str(base[0]))
    try:
        _check_room(tmp)
        passphrase = await asyncio.to_thread(read_key, key) if key is not None else None
        if preallocate or format != "qcow2":
            if passphrase is None:
                await _make_whole(half, size, format, preallocate)
            else:
                await _make_whole_encrypted(half, size, passphrase)
            if base is not None:
                await _fill([LayerFile(*base)], LayerFile(half, format, key), progress)
        below = (str(base[0]), base[1]) if base is not None else None
        if marks:
            await in_thread(lambda _: _make(half, size, below, passphrase))
            await _mark(LayerFile(half, key=key), marks)
        # Cancelled: not after we are gone.
        await in_thread(lambda _: _settle(half, path, size, below, passphrase))
    except ProgramError as error:
        if "No space left" in error.message:
            raise _full(path) from None
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from None
        raise
    finally:
        half.unlink(missing_ok=True)


async def _mark(file: LayerFile, marks: Sequence[str]) -> None:
    """Adds dirty bitmaps to a file. What it lies on is of no importance: named as nothing."""
    objects: list[str] = []
    described = _options(_node(file, None, objects))
    for mark in marks:
        command = [tool("qemu-img", package="qemu-utils"), "bitmap", "--add", "-g", "64K"]
        command += [*objects, "--image-opts", described, mark]
        await run(command, timeout=_CREATE_TIMEOUT)


async def _make_whole(half: Path, size: int, format: str, preallocate: bool) -> None:
    if preallocate:
        require_space("the volume", half.parent, size)
    options = f"preallocation={_preallocation(preallocate)}"
    command = [tool("qemu-img", package="qemu-utils"), "create", "-q", "-f", format]
    await run([*command, "-o", options, str(half), str(size)], timeout=_COPY_TIMEOUT)


async def _make_whole_encrypted(half: Path, size: int, passphrase: bytes) -> None:
    """An empty file whose room is taken beyond its end: what was never written to reads as zeroes,
    which it would not if it were decrypted."""
    room = size + size // _OVERHEAD + _SLACK
    require_space("the volume", half.parent, room)
    await in_thread(lambda _: write_empty(half, size, None, passphrase))
    command = [tool("fallocate", package="util-linux"), "--keep-size", f"--length={room}"]
    await run([*command, str(half)], timeout=_COPY_TIMEOUT)


async def _fill(
    chain: Sequence[LayerFile], target: LayerFile, progress: Callable[[float], None] | None
) -> None:
    """Copies what a chain shows into a file that is there, and empty: its room stays taken where
    the chain has nothing."""
    objects: list[str] = []
    graph: dict[str, Any] | None = None
    for file in reversed(chain):
        graph = _node(file, graph, objects)
    into = _node(target, None, objects)
    command = [tool("qemu-img", package="qemu-utils"), "convert", "-p", "-n", "--target-is-zero"]
    if target.key is None:
        command += [*objects, "-O", target.format, "json:" + json.dumps(graph), str(target.path)]
    else:
        command += [*objects, "--target-image-opts", "json:" + json.dumps(graph)]
        command.append(_options(into))
    await run(command, timeout=_COPY_TIMEOUT, on_output=percentage(progress))


def _node(file: LayerFile, backing: Mapping[str, Any] | None, objects: list[str]) -> dict[str, Any]:
    """A file as QEMU's tools take it, with nothing left to its header; ``objects``: arguments that
    name the file of its key are added there."""
    below = {"driver": "file", "filename": str(file.path)}
    node: dict[str, Any] = {"driver": file.format, "file": below}
    if file.format == "qcow2":
        node["backing"] = backing
    if file.key is not None:
        id = f"key{len(objects)}"
        node["encrypt"] = {"format": "luks", "key-secret": id}
        path = str(file.key).replace(",", ",,")
        objects += ["--object", f"secret,id={id},format=raw,file={path}"]
    return node


def _options(node: Mapping[str, Any], prefix: str = "") -> str:
    """A node in QEMU's other notation, which is the only one for what is written to."""
    parts = []
    for key, value in node.items():
        if isinstance(value, Mapping):
            parts.append(_options(value, f"{prefix}{key}."))
        else:
            text = "" if value is None else str(value)
            parts.append(f"{prefix}{key}={text.replace(',', ',,')}")
    return ",".join(parts)


async def copy_chain(
    chain: Sequence[LayerFile],
    path: Path,
    size: int,
    *,
    tmp: Path,
    key: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Copies what a chain of files shows (from the top down) into a new volume of ``size`` bytes at
    ``path``, which lies on nothing; with a ``key`` it is encrypted. Nobody may write to the chain.

    Raises:
        NoSpaceError: the host's disk is full. ProgramError: qemu-img failed.
    """
    half = tmp / f"volume-{secrets.token_hex(8)}"
    try:
        passphrase = await asyncio.to_thread(read_key, key) if key is not None else None
        await in_thread(lambda _: write_empty(half, size, None, passphrase))
        await _fill(chain, LayerFile(half, "qcow2", key), progress)
        await in_thread(lambda _: _settle(half, path, size, None))
    except ProgramError as error:
        if "No space left" in error.message:
            raise _full(path) from None
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(path) from None
        raise
    finally:
        half.unlink(missing_ok=True)


def percentage(progress: Callable[[float], None] | None) -> Callable[[bytes], None]:
    """Reads how far ``qemu-img -p`` says that it is."""

    def watch(data: bytes) -> None:
        found = _PERCENT.findall(data)
        if found and progress is not None:
            progress(float(found[-1]) / 100)

    return watch


def _preallocation(wanted: bool) -> str:
    return "falloc" if wanted else "off"


def _alone(file: LayerFile) -> list[str]:
    """How a tool is given one file: what its header says that it lies on is not followed, and may
    not even be there."""
    objects: list[str] = []
    node = _node(file, None, objects)
    return [*objects, "json:" + json.dumps(node)]


def _check_room(directory: Path) -> None:
    usage = os.statvfs(directory)
    if usage.f_bavail * usage.f_frsize < _SLACK:
        raise _full(directory)


def _full(path: Path) -> NoSpaceError:
    return NoSpaceError(
        f"the disk that holds {path.parent} is full",
        object=str(path.parent),
        action="make room (croft image rm, croft rm), then try again",
    )


def _make(half: Path, size: int, base: tuple[str, str] | None, passphrase: bytes | None) -> None:
    if not half.exists():
        write_empty(half, size, base, passphrase)


def _settle(
    half: Path,
    path: Path,
    size: int,
    base: tuple[str, str] | None,
    passphrase: bytes | None = None,
) -> None:
    """Makes a file durable under its name: an empty one, unless it is there already."""
    _make(half, size, base, passphrase)
    half.chmod(0o600)
    _sync(half)
    half.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


async def volume_info(path: Path) -> VolumeInfo:
    """Sizes of a volume; works while a VM uses it.

    Raises:
        DataCorruptError: it is not a qcow2 file.
    """
    command = [tool("qemu-img", package="qemu-utils"), "info", "-U", "-f", "qcow2"]
    try:
        answer = json.loads(
            await run([*command, "--output=json", str(path)], timeout=_CREATE_TIMEOUT)
        )
        return VolumeInfo(
            virtual_size=int(answer["virtual-size"]), allocated=int(answer["actual-size"])
        )
    except (ProgramError, ValueError, KeyError) as error:
        raise DataCorruptError(
            f"{path} is not a volume that can be read: {error}", object=str(path)
        ) from error


async def resize_volume(
    path: Path,
    size: int,
    *,
    format: str = "qcow2",
    preallocate: bool = False,
    key: Path | None = None,
) -> None:
    """Makes a volume that nobody uses larger (bytes as the guest sees them); with ``preallocate``
    the new part has all of its room. ``key``: that of an encrypted one. May be repeated.

    Raises:
        NoSpaceError: the host's disk is full. ProgramError: qemu-img failed.
    """
    file = LayerFile(path, format, key)
    if format == "qcow2":
        await _drop_lost_marks(file)
    command = [tool("qemu-img", package="qemu-utils"), "resize", "-q"]
    # What is allocated before it is written to would be garbage once it is decrypted.
    command += [f"--preallocation={_preallocation(preallocate and key is None)}"]
    try:
        await run([*command, *_alone(file), str(size)], timeout=_CREATE_TIMEOUT)
        if preallocate and key is not None:
            room = size + size // _OVERHEAD + _SLACK
            command = [tool("fallocate", package="util-linux"), "--keep-size"]
            await run([*command, f"--length={room}", str(path)], timeout=_COPY_TIMEOUT)
    except ProgramError as error:
        if "No space left" in error.message:
            raise _full(path) from None
        raise
    await in_thread(lambda _: _sync(path))


async def _drop_lost_marks(file: LayerFile) -> None:
    """Removes the bitmaps that a killed QEMU left: qemu-img would refuse to resize the file."""
    program = tool("qemu-img", package="qemu-utils")
    command = [program, "info", "--output=json", *_alone(file)]
    described = json.loads(await run(command, timeout=_CREATE_TIMEOUT))
    for bitmap in described.get("format-specific", {}).get("data", {}).get("bitmaps", ()):
        if "in-use" in bitmap.get("flags", ()):
            command = [program, "bitmap", "--remove", *_alone(file), bitmap["name"]]
            await run(command, timeout=_CREATE_TIMEOUT)


async def check_volume(path: Path, *, key: Path | None = None, repair: bool = False) -> list[str]:
    """What is wrong inside a volume that no VM uses, in words; empty if nothing. ``repair`` mends
    what can be mended without guessing (leaked clusters, qemu-img check -r leaks). ``key``: that of
    an encrypted one."""
    command = [tool("qemu-img", package="qemu-utils"), "check", "--output=json"]
    if repair:
        command += ["-r", "leaks"]
    try:
        # qemu-img exits with 2 if it found corruption, with 3 for leaks.
        report = await run(
            [*command, *_alone(LayerFile(path, key=key))], timeout=_CHECK_TIMEOUT, success=(0, 2, 3)
        )
        answer = json.loads(report)
    except ProgramError as error:
        return [error.message]
    except ValueError:
        return ["qemu-img check gave no answer"]
    found = []
    if answer.get("corruptions"):
        found.append(f"{answer['corruptions']} corrupt entries in {path.name}")
    if answer.get("leaks") and not repair:
        leaked = format_size(int(answer["leaks"]) * int(answer.get("cluster-size", 65536)))
        found.append(f"{leaked} leaked in {path.name}")
    return found
