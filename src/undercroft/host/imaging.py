"""How images come to be: built, imported or fetched, by the storage package."""

from __future__ import annotations

from dataclasses import dataclass

from undercroft.host.environment import Environment
from undercroft.host.outcome import TaskRun
from undercroft.model.errors import UnsupportedError
from undercroft.model.image import Image, ImageContent


@dataclass(frozen=True)
class MadeImage:
    """What was made: its digest, its size on the host in bytes, its content."""

    digest: str
    size: int
    content: ImageContent


async def make_image(environment: Environment, image: Image, run: TaskRun) -> MadeImage:
    """Makes an image."""
    raise UnsupportedError("not yet")


async def remove_image(environment: Environment, image: Image) -> None:
    """Removes an image's files."""
