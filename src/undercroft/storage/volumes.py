"""Volumes: qcow2 files, alone or as an overlay over an image's disk."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from undercroft.model.base import Model
from undercroft.model.errors import DataCorruptError, DataError, NoSpaceError, ProgramError
from undercroft.model.units import format_size
from undercroft.storage.files import require_space
from undercroft.storage.formats.empty import write_empty
from undercroft.storage.process import run, tool
from undercroft.storage.threads import in_thread

__all__ = [
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
    progress: Callable[[float], None] | None = None,
    marks: Sequence[str] = (),
) -> None:
    """Makes a volume of ``size`` bytes at ``path``; made in ``tmp`` and then moved, so that it is
    there whole or not at all.

    ``base`` is an image's disk and its format, which the volume overlays. Its name in the header is
    for people only: QEMU is told the chain, and never follows the header. With ``preallocate`` the
    file has all of its room from the beginning, and, as with ``format`` raw, a copy of the
    ``base``. ``marks`` are the names of bitmaps in which QEMU notes what is written.

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
        if preallocate or format != "qcow2":
            await _whole(half, size, format, base, preallocate, progress)
        below = (str(base[0]), base[1]) if base is not None else None
        if marks:
            await in_thread(lambda _: _make(half, size, below))
            await _mark(half, marks)
        # Cancelled: not after we are gone.
        await in_thread(lambda _: _settle(half, path, size, below))
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


async def _mark(half: Path, marks: Sequence[str]) -> None:
    """Adds dirty bitmaps to a file. What it lies on is of no importance: named as nothing."""
    name = str(half).replace(",", ",,")
    described = f"driver=qcow2,file.driver=file,file.filename={name},backing="
    for mark in marks:
        command = [tool("qemu-img", package="qemu-utils"), "bitmap", "--add", "-g", "64K"]
        await run([*command, "--image-opts", described, mark], timeout=_CREATE_TIMEOUT)


async def _whole(
    half: Path,
    size: int,
    format: str,
    base: tuple[Path, str] | None,
    preallocate: bool,
    progress: Callable[[float], None] | None,
) -> None:
    if preallocate:
        require_space("the volume", half.parent, size)
    qemu_img = tool("qemu-img", package="qemu-utils")
    options = f"preallocation={_preallocation(preallocate)}"
    command = [qemu_img, "create", "-q", "-f", format, "-o", options, str(half), str(size)]
    await run(command, timeout=_COPY_TIMEOUT)
    if base is not None:
        # -n: into the file that is there, whose room stays taken where the base has nothing.
        command = [qemu_img, "convert", "-p", "-n", "--target-is-zero", "-f", base[1]]
        command += ["-O", format, str(base[0]), str(half)]
        await run(command, timeout=_COPY_TIMEOUT, on_output=percentage(progress))


async def copy_chain(
    chain: Sequence[tuple[str, str]],
    path: Path,
    size: int,
    *,
    tmp: Path,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Copies what a chain of files shows (each path and format, from the top down) into a new
    volume of ``size`` bytes at ``path``, which lies on nothing. Nobody may write to the chain.

    Raises:
        NoSpaceError: the host's disk is full. ProgramError: qemu-img failed.
    """
    half = tmp / f"volume-{secrets.token_hex(8)}"
    graph: dict[str, Any] | None = None
    for file, format in reversed(chain):
        node: dict[str, Any] = {"driver": format, "file": {"driver": "file", "filename": file}}
        if format == "qcow2":
            node["backing"] = graph  # what its header says is not followed
        graph = node
    try:
        await in_thread(lambda _: write_empty(half, size))
        command = [tool("qemu-img", package="qemu-utils"), "convert", "-p", "-n"]
        command += ["--target-is-zero", "-O", "qcow2", "json:" + json.dumps(graph), str(half)]
        await run(command, timeout=_COPY_TIMEOUT, on_output=percentage(progress))
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


def _alone(path: Path, format: str = "qcow2") -> str:
    """How a tool is given one file: what its header says that it lies on is not followed, and may
    not even be there."""
    image: dict[str, Any] = {"driver": format, "file": {"driver": "file", "filename": str(path)}}
    if format == "qcow2":
        image["backing"] = None
    return "json:" + json.dumps(image)


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


def _make(half: Path, size: int, base: tuple[str, str] | None) -> None:
    if not half.exists():
        write_empty(half, size, base)


def _settle(half: Path, path: Path, size: int, base: tuple[str, str] | None) -> None:
    """Makes a file durable under its name: an empty one, unless it is there already."""
    _make(half, size, base)
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
    path: Path, size: int, *, format: str = "qcow2", preallocate: bool = False
) -> None:
    """Makes a volume that nobody uses larger (bytes as the guest sees them); with ``preallocate``
    the new part has all of its room. May be repeated.

    Raises:
        NoSpaceError: the host's disk is full. ProgramError: qemu-img failed.
    """
    command = [tool("qemu-img", package="qemu-utils"), "resize", "-q"]
    command += [f"--preallocation={_preallocation(preallocate)}", _alone(path, format), str(size)]
    try:
        await run(command, timeout=_CREATE_TIMEOUT)
    except ProgramError as error:
        if "No space left" in error.message:
            raise _full(path) from None
        raise
    await in_thread(lambda _: _sync(path))


async def check_volume(path: Path, *, repair: bool = False) -> list[str]:
    """What is wrong inside a volume that no VM uses, in words; empty if nothing. ``repair`` mends
    what can be mended without guessing (leaked clusters, qemu-img check -r leaks)."""
    command = [tool("qemu-img", package="qemu-utils"), "check", "--output=json"]
    if repair:
        command += ["-r", "leaks"]
    try:
        # qemu-img exits with 2 if it found corruption, with 3 for leaks.
        report = await run([*command, _alone(path)], timeout=_CHECK_TIMEOUT, success=(0, 2, 3))
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
