"""Installations that end with their test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that unprivileged programs can reach into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="croft-") as path:
        Path(path).chmod(0o711)
        yield Path(path)


@pytest.fixture
def empty(place: Path) -> Iterator[Installation]:
    """An installation without images, its daemon not yet started."""
    installation = Installation(place / "data")
    yield installation
    installation.close()


@pytest.fixture
def installation(empty: Installation, tiny_image_dir: Path) -> Installation:
    """An installation with the image ``tiny`` and a running daemon."""
    empty.add_image(tiny_image_dir)
    empty.start()
    return empty
