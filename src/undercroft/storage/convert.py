"""Converting with qemu-img: untrusted images into qcow2 of our own, and disks of ours into the
formats of others."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Sequence
from pathlib import Path

from undercroft.model.errors import (
    DataCorruptError,
    HostileImageError,
    ProgramError,
    TimeLimitError,
)
from undercroft.model.image import DiskFormat
from undercroft.model.units import GiB, MiB
from undercroft.storage.files import RESERVE, free_space, no_space, require_space
from undercroft.storage.formats.qcow2 import stays_inside
from undercroft.storage.process import Identity, Limits, Progress, run, tool
from undercroft.storage.streams.extents import ChainLayer, source_argument

__all__ = ["convert", "convert_out"]

# What qemu-img may use; a plain conversion needs about 150 MiB of address space and seconds of CPU
# per GiB (measured: 1.6 s for a GiB of random data on a slow machine, 9 s compressed).
_MEMORY = 2 * GiB
_CPU_BASE, _CPU_PER_GIB = 60, 60
_LOOK = 0.2  # seconds between two looks at the room that is left
_PERCENT = re.compile(rb"\(([0-9.]+)/100%\)")
_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


async def convert(
    directory: Path,
    source: str,
    format: DiskFormat,
    target: str,
    *,
    data_size: int,
    identity: Identity | None,
    progress: Progress,
) -> None:
    """Converts ``source`` into the new qcow2 ``target``, both names inside ``directory``.

    The header of the source must have been inspected. qemu-img runs there as ``identity`` (None: as
    this process), with limits on memory, CPU time, file size and open files; the format is stated,
    and paths are relative, so that the unprivileged user needs no way through our directories.
    ``data_size`` in bytes is what the source holds at most.

    Raises:
        HostileImageError: qemu-img cannot read it, or it needs far more than it should.
        NoSpaceError: the disk filled up.
    """
    cpu = _CPU_BASE + _CPU_PER_GIB * (data_size // GiB + 1)
    room = max(free_space(directory) - RESERVE, 1 * MiB)
    command = [
        tool("prlimit", package="util-linux"), f"--fsize={room}", "--",
        tool("qemu-img", package="qemu-utils"), "convert", "-p", "-f", str(format),
        "-O", "qcow2", "-o", "compat=1.1,cluster_size=65536,lazy_refcounts=off",
        source, target,
    ]  # fmt: skip

    def watch(data: bytes) -> None:
        found = _PERCENT.findall(data)
        if found:
            progress(float(found[-1]) / 100, "converting")

    try:
        await run(
            command,
            cwd=directory,
            limits=Limits(memory=_MEMORY, cpu=cpu),
            identity=identity,
            timeout=10.0 * cpu,
            on_output=watch,
        )
    except TimeLimitError as error:
        raise _too_costly() from error
    except ProgramError as error:
        full = any(text in error.message for text in _FULL)
        if full or error.data.get("exit") == -signal.SIGXFSZ:
            raise await asyncio.to_thread(no_space, "the converted image", directory) from error
        if error.data.get("exit") in (-signal.SIGXCPU, -signal.SIGKILL):
            raise _too_costly() from error
        raise HostileImageError(
            f"the image is refused: qemu-img cannot read it as {format}: {error.message[-500:]}",
            action="check that it is complete and that its format is the one stated",
        ) from error


def _too_costly() -> HostileImageError:
    return HostileImageError(
        "the image is refused: converting it takes far longer than it should",
        action="convert it to a plain raw or qcow2 image where it comes from",
    )


async def convert_out(
    layers: Sequence[ChainLayer],
    target: Path,
    format: str,
    options: str,
    *,
    progress: Progress,
) -> None:
    """Writes a disk, which nobody writes to meanwhile, as one file in a format of qemu-img, with
    these creation options.

    Raises:
        NoSpaceError: the disk filled up. DataCorruptError: a layer refers to something else.
        ProgramError: qemu-img failed.
    """
    await asyncio.to_thread(_check_layers, layers)
    command = [tool("qemu-img", package="qemu-utils"), "convert", "-p", "-O", format]
    command += [*(["-o", options] if options else []), source_argument(layers), str(target)]

    def watch(data: bytes) -> None:
        found = _PERCENT.findall(data)
        if found:
            progress(float(found[-1]) / 100, "writing the disk")

    work = asyncio.ensure_future(run(command, cwd=target.parent, on_output=watch))
    try:
        while not work.done():
            await asyncio.wait({work}, timeout=_LOOK)
            await asyncio.to_thread(require_space, "the export", target.parent, 0)
        work.result()
    except ProgramError as error:
        if any(text in error.message for text in _FULL):
            raise await asyncio.to_thread(no_space, "the export", target.parent) from error
        raise
    finally:
        if not work.done():
            work.cancel()
            await asyncio.wait({work})
        elif not work.cancelled():
            work.exception()  # seen: the full disk was noticed first


def _check_layers(layers: Sequence[ChainLayer]) -> None:
    """Each was written by a QEMU that a guest was in: its header may name another file as the place
    of its data, which qemu-img would follow."""
    for layer in layers:
        if layer.format == "qcow2":
            with layer.path.open("rb") as file:
                if not stays_inside(file.read(104)):
                    raise DataCorruptError(
                        f"{layer.path} says that its data is elsewhere",
                        object=str(layer.path),
                        action="do not use it: restore the VM from a backup",
                    )
