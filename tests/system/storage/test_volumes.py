"""Volumes, with the real qemu-img."""

import os
import subprocess
from pathlib import Path

import pytest

from undercroft.model.errors import DataCorruptError, DataError, InvalidError, NoSpaceError
from undercroft.storage.volumes import check_volume, create_volume, volume_info

MiB = 1 << 20


def execute(*argv: str | Path) -> None:
    subprocess.run(argv, check=True, capture_output=True)


@pytest.fixture
def tmp(tmp_path: Path) -> Path:
    (tmp_path / "tmp").mkdir()
    (tmp_path / "volumes").mkdir()
    return tmp_path / "tmp"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    raw, path = tmp_path / "base.raw", tmp_path / "base.qcow2"
    raw.write_bytes(b"of the image" + bytes(8 * MiB - 12))
    execute("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


async def test_blank_volume_is_thin(tmp: Path):
    path = tmp.parent / "volumes/vol-1.qcow2"
    await create_volume(path, 10 << 30, tmp=tmp)
    info = await volume_info(path)
    assert info.virtual_size == 10 << 30
    assert info.allocated < MiB
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp.iterdir()) == []
    assert await check_volume(path) == []


async def test_overlay_reads_the_image_and_leaves_it_alone(tmp: Path, base: Path):
    before = base.read_bytes()
    path = tmp.parent / "volumes/vol-2.qcow2"
    await create_volume(path, 64 * MiB, base=(base, "qcow2"), tmp=tmp)
    assert (await volume_info(path)).virtual_size == 64 * MiB
    execute("qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 64k", path)
    out = tmp.parent / "out.raw"
    execute("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    data = out.read_bytes()
    assert data[:12] == b"of the image"
    assert data[MiB : MiB + 65536] == b"\x07" * 65536
    assert base.read_bytes() == before


async def test_what_is_not_a_volume(tmp: Path):
    path = tmp.parent / "volumes/vol-3.qcow2"
    path.write_bytes(b"nonsense" * 1000)
    with pytest.raises(DataCorruptError):
        await volume_info(path)
    with pytest.raises(DataCorruptError):
        await volume_info(path.with_name("missing.qcow2"))
    assert await check_volume(path) != []


async def test_leaks_are_found_and_mended(tmp: Path):
    path = tmp.parent / "volumes/vol-4.qcow2"
    await create_volume(path, 64 * MiB, tmp=tmp)
    # An image that is cut off while it grows leaves clusters counted that nothing uses.
    data = bytearray(path.read_bytes())
    refcount_block = int.from_bytes(data[65536 : 65536 + 8], "big")
    used = -(-len(data) // 65536)
    data += bytes((used + 1) * 65536 - len(data))
    at = refcount_block + 2 * used
    data[at : at + 2] = (1).to_bytes(2, "big")
    path.write_bytes(data)
    assert any("leaked" in text for text in await check_volume(path))
    assert await check_volume(path, repair=True) == []
    assert await check_volume(path) == []


async def test_nothing_is_left_when_it_cannot_be_made(tmp: Path):
    path = tmp.parent / "volumes/vol-5.qcow2"
    with pytest.raises(DataError, match=r"missing\.qcow2 is gone"):
        await create_volume(path, MiB, base=(tmp / "missing.qcow2", "qcow2"), tmp=tmp)
    with pytest.raises(InvalidError, match="too large"):
        await create_volume(path, 1 << 63, tmp=tmp)
    assert not path.exists()
    assert list(tmp.iterdir()) == []


async def test_full_disk_is_said_clearly(tmp: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.statvfs(tmp)
    full = os.statvfs_result((*real[:3], 0, 0, *real[5:]))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(NoSpaceError) as caught:
        await create_volume(tmp.parent / "volumes/vol-6.qcow2", MiB, tmp=tmp)
    assert caught.value.action
    assert list(tmp.iterdir()) == []
