"""Machines for the tests of the hypervisor."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.system.hypervisor.lab import Lab


@pytest.fixture
async def lab(tmp_path: Path, tiny_image_dir: Path) -> AsyncIterator[Lab]:
    """A place for machines, which end with the test."""
    place = await Lab.open(tmp_path, tiny_image_dir)
    yield place
    await place.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A directory on a file system of 16 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system needs root")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)
