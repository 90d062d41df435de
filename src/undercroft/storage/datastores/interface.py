"""What every kind of datastore can do. A kind is a file beside this one.

``name`` is that of a layer's file, such as ``layer-….qcow2``. Everything may be repeated; what is
half made is never seen under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from undercroft.storage.volumes import LayerFile

__all__ = ["Driver", "Space"]


@dataclass(frozen=True)
class Space:
    """Bytes of a datastore altogether, and those that can still be written."""

    capacity: int
    free: int


class Driver(Protocol):
    """A datastore that is in use. All methods may raise `UnavailableError`: it is not there."""

    async def check(self) -> None:
        """Does nothing if it is there, and is the one that it should be."""

    def path(self, name: str) -> Path:
        """By which QEMU is given the file, which may not be there."""

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
        """Makes a file for a disk of ``size`` bytes, over a ``base`` (path and format) or empty; an
        encrypted one with a ``key`` (the path of it); ``marks``: with these dirty bitmaps.

        Raises:
            NoSpaceError: there is no room.
        """

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
        """Makes a qcow2 file of what a chain of files shows, from the top down, that lies on
        nothing; an encrypted one with a ``key``. ``whole``: the chain is one qcow2 file of that
        size, to be copied as it is, by sharing its blocks where that can be; its key opens both.

        Raises:
            NoSpaceError: there is no room.
        """

    def half(self) -> Path:
        """A fresh path for a file that gets its name when it is whole (`adopt`)."""

    async def adopt(self, half: Path, name: str) -> None:
        """Gives a file that is whole and synchronised its name."""

    async def remove(self, name: str) -> None:
        """Removes a file; nothing happens if it is gone."""

    async def names(self) -> list[str]:
        """The files of layers that are there."""

    async def space(self) -> Space:
        """How large it is, and what is left."""
