"""Copies on a file system that shares blocks."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft.storage.reflink import can_reflink, copy_file
from undercroft.storage.threads import Stop

MiB = 1 << 20


@pytest.fixture(scope="module")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that shares blocks, where one can be made and mounted."""
    home = tmp_path_factory.mktemp("xfs")
    image, path = home / "image", home / "mounted"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(320 * MiB)
    try:
        subprocess.run(["mkfs.xfs", "-q", image], check=True, capture_output=True)
        subprocess.run(["mount", "-o", "loop", image, path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no XFS here: {error}")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def test_copies_take_no_room_where_blocks_are_shared(xfs: Path) -> None:
    assert can_reflink(xfs)
    assert list(xfs.iterdir()) == []
    source = xfs / "source"
    source.write_bytes(os.urandom(32 * MiB))
    os.sync()
    before = os.statvfs(xfs).f_bfree
    assert copy_file(source, xfs / "target", Stop())
    os.sync()
    taken = (before - os.statvfs(xfs).f_bfree) * os.statvfs(xfs).f_frsize
    assert taken < MiB
    assert (xfs / "target").read_bytes() == source.read_bytes()
