"""What a chain of layers holds, read without going through QEMU.

``qemu-img map`` tells in which layer, and where in its file, each piece of the disk lies. Only
that is taken from it: the bytes are read from files that we opened ourselves.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from undercroft.model.errors import DataCorruptError
from undercroft.model.units import GiB
from undercroft.storage.process import tool
from undercroft.storage.threads import Stop

__all__ = ["ChainLayer", "Piece", "data_pieces", "opened", "source_argument"]

_WINDOW = 4 * GiB  # looked up at once: bounds what qemu-img prints
_ERRORS = 2000
# QEMU's image locking (block/file-posix.c): whoever holds this byte does not share writing.
_NOT_SHARING_WRITES = 201


@dataclass(frozen=True)
class ChainLayer:
    """A file of a chain; the first is the top. ``format``: qcow2 or raw."""

    path: Path
    format: str


@dataclass(frozen=True)
class Piece:
    """Bytes of the disk: ``length`` of them from ``start`` on are in file ``depth`` (0: the top)
    from ``offset`` on."""

    start: int
    length: int
    depth: int
    offset: int


def source_argument(layers: Sequence[ChainLayer]) -> str:
    """The chain as QEMU's tools take it: stated in full, so that no header is followed."""
    node: dict[str, Any] | None = None
    for layer in reversed(layers):
        file = {"driver": "file", "filename": str(layer.path)}
        below = {"backing": node} if layer.format == "qcow2" else {}
        node = {"driver": layer.format, "file": file, **below}
    return "json:" + json.dumps(node)


@contextlib.contextmanager
def opened(layers: Sequence[ChainLayer]) -> Iterator[list[int]]:
    """Descriptors of the files of a chain; no QEMU writes to them inside the block."""
    descriptors: list[int] = []
    try:
        for layer in layers:
            fd = os.open(layer.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            descriptors.append(fd)
            lock = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, _NOT_SHARING_WRITES, 1, 0)
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        yield descriptors
    finally:
        for fd in descriptors:
            os.close(fd)


def data_pieces(layers: Sequence[ChainLayer], size: int, stop: Stop) -> Iterator[Piece]:
    """Where the data of a disk of ``size`` bytes is, in ascending order; what is left out is zero.

    Raises:
        DataCorruptError: qemu-img cannot read the chain, or part of it is compressed.
    """
    source = source_argument(layers)
    for start in range(0, size, _WINDOW):
        length = min(_WINDOW, size - start)
        for extent in _map(source, start, length, stop):
            if not extent["data"] or extent["zero"]:
                continue
            if "offset" not in extent:
                raise DataCorruptError(f"part of {layers[0].path} is compressed")
            yield Piece(
                int(extent["start"]), int(extent["length"]), int(extent["depth"]),
                int(extent["offset"]),
            )  # fmt: skip


def _map(source: str, start: int, length: int, stop: Stop) -> list[dict[str, Any]]:
    command = [tool("qemu-img", package="qemu-utils"), "map", "--output=json"]
    command += [f"--start-offset={start}", f"--max-length={length}", source]
    stop.check()
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        stop.also(child.kill)
        output, said = child.communicate()
    stop.check()
    if child.returncode != 0:
        text = said.decode(errors="replace")[-_ERRORS:]
        raise DataCorruptError(f"the disk cannot be read: {text}")
    found: list[dict[str, Any]] = json.loads(output)
    return found
