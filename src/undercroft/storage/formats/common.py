"""What the readers of all formats share."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import Any

from undercroft.model.errors import HostileImageError
from undercroft.model.units import TiB, format_size

__all__ = ["Image", "Inspected", "Limits", "check_virtual_size", "refuse"]


@dataclass(frozen=True)
class Limits:
    """What an image may be. ``virtual_size`` in bytes: the largest disk that is accepted."""

    virtual_size: int = 16 * TiB


@dataclass(frozen=True)
class Inspected:
    """What is inside, in bytes: the disk's size, and at most how much of it holds data."""

    virtual_size: int
    data_size: int


@dataclass(frozen=True)
class Image:
    """An image of ``size`` bytes, which begins at ``start`` of an open file."""

    fd: int
    size: int
    start: int = 0

    def read(self, offset: int, length: int, what: str) -> bytes:
        """Exactly ``length`` bytes.

        Raises:
            HostileImageError: they are not all there.
        """
        if offset < 0 or length < 0 or offset + length > self.size:
            raise refuse(f"its {what} lies outside of the file (is it truncated?)")
        data = os.pread(self.fd, length, self.start + offset)
        if len(data) != length:
            raise refuse(f"its {what} cannot be read: the file is changing")
        return data

    def peek(self, offset: int, most: int) -> bytes:
        """Up to ``most`` bytes, fewer where the image ends."""
        return os.pread(self.fd, max(0, min(most, self.size - offset)), self.start + offset)

    def unpack(self, layout: str, offset: int, what: str) -> tuple[Any, ...]:
        """Fields as of `struct`, from an offset in the file."""
        return struct.unpack(layout, self.read(offset, struct.calcsize(layout), what))


def refuse(reason: str) -> HostileImageError:
    """The error for an image that is not taken."""
    return HostileImageError(
        f"the image is refused: {reason}",
        action="get it again from a source you trust, or convert it there to a plain image",
    )


def check_virtual_size(size: int, limits: Limits) -> int:
    """Returns the disk's size if it is possible and allowed."""
    if size <= 0:
        raise refuse("its disk has no size")
    if size > limits.virtual_size:
        raise refuse(
            f"its disk would have {format_size(size)}, more than the limit of "
            f"{format_size(limits.virtual_size)}"
        )
    return size
