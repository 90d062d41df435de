"""Unpacking with the real programs: what comes out, what is refused, what is cancelled."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import lzma
import os
from pathlib import Path

import pytest

from undercroft.model.errors import (
    HostileImageError,
    InvalidError,
    MissingToolError,
    NoSpaceError,
    TooLargeError,
)
from undercroft.storage import decompress as unpacking
from undercroft.storage import files
from undercroft.storage.decompress import compression_of, decompress
from undercroft.storage.importing import UNTRUSTED

DATA = b"boot" + os.urandom(100_000) + bytes(8 << 20) + b"end"
PACKED = {".xz": lzma.compress(DATA), ".gz": gzip.compress(DATA), ".bz2": bz2.compress(DATA)}


@pytest.mark.parametrize(
    ("name", "compression"),
    [
        ("disk.qcow2.xz", ".xz"),
        ("/a/b.c/DISK.RAW.XZ", ".xz"),
        ("disk.img.gz", ".gz"),
        ("disk.zst", ".zst"),
        ("disk.qcow2", None),
        ("xz", None),
        ("", None),
    ],
)
def test_the_name_tells(name: str, compression: str | None) -> None:
    assert compression_of(name) == compression


@pytest.mark.parametrize("compression", PACKED)
async def test_what_comes_out(tmp_path: Path, compression: str) -> None:
    (tmp_path / "packed").write_bytes(PACKED[compression])
    (tmp_path / "out").write_bytes(b"what an earlier attempt left")
    told: list[tuple[float, str]] = []
    await decompress(
        tmp_path / "packed",
        tmp_path / "out",
        compression,
        identity=UNTRUSTED,
        progress=lambda f, p: told.append((f, p)),
    )
    assert (tmp_path / "out").read_bytes() == DATA
    assert (tmp_path / "out").stat().st_blocks * 512 < 4 << 20, "zeros are holes"
    assert told[-1] == (1.0, "unpacking, 8.1M so far")


@pytest.mark.parametrize(
    "packed",
    [b"", b"no such thing", PACKED[".xz"][:-20], PACKED[".xz"][:50] + b"x" * 50, PACKED[".gz"]],
    ids=["empty", "text", "cut off", "damaged", "another"],
)
async def test_what_is_refused(tmp_path: Path, packed: bytes) -> None:
    (tmp_path / "packed").write_bytes(packed)
    with pytest.raises(HostileImageError, match="cannot be unpacked: xz ended with"):
        await decompress(tmp_path / "packed", tmp_path / "out", ".xz")
    assert not (tmp_path / "out").exists()


async def test_more_than_the_limit(tmp_path: Path) -> None:
    """A bomb: a few kilobytes that become 8 MB."""
    (tmp_path / "packed").write_bytes(PACKED[".xz"])
    with pytest.raises(TooLargeError, match="more than 1M"):
        await decompress(tmp_path / "packed", tmp_path / "out", ".xz", limit=1 << 20)
    assert not (tmp_path / "out").exists()


async def test_more_than_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "packed").write_bytes(gzip.compress(os.urandom(3 << 20), 1))
    monkeypatch.setattr(unpacking, "_CHECK_EVERY", 1 << 20)
    monkeypatch.setattr(files, "free_space", lambda path: 1 << 20)
    with pytest.raises(NoSpaceError):
        await decompress(tmp_path / "packed", tmp_path / "out", ".gz")
    assert not (tmp_path / "out").exists()


async def test_cancelling(tmp_path: Path) -> None:
    """The program waits for more input, which never comes."""
    os.mkfifo(tmp_path / "packed")
    writer = os.open(tmp_path / "packed", os.O_RDWR)
    try:
        task = asyncio.create_task(decompress(tmp_path / "packed", tmp_path / "out", ".xz"))
        while not (tmp_path / "out").exists():
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await task
    finally:
        os.close(writer)
    assert not (tmp_path / "out").exists()


async def test_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidError):
        await decompress(tmp_path / "packed", tmp_path / "out", ".rar")
    monkeypatch.setattr("shutil.which", lambda name, path: None if name == "xz" else f"/bin/{name}")
    with pytest.raises(MissingToolError, match="xz") as caught:
        await decompress(tmp_path / "packed", tmp_path / "out", ".xz")
    assert "xz-utils" in str(caught.value.action)
