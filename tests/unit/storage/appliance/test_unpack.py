"""Disks of every format become ours with the same content, and nothing else is left."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.storage.appliance import packages
from tests.unit.storage.appliance.packages import MiB, archive
from tests.unit.storage.appliance.test_package import resigned, unpacked
from undercroft.model.errors import HostileImageError, TooLargeError
from undercroft.model.image import DiskFormat
from undercroft.storage.appliance.package import open_package
from undercroft.storage.appliance.unpack import unpack_disk
from undercroft.storage.process import no_progress

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")
SIZE = 8 * MiB
FORMATS = {
    "raw": ("raw", ""),
    "qcow2": ("qcow2", ""),
    "qcow2 compressed": ("qcow2", "-c"),
    "qcow2 old": ("qcow2", "compat=0.10"),
    "qcow2 small clusters": ("qcow2", "cluster_size=512"),
    "qcow2 large clusters": ("qcow2", "cluster_size=2M"),
    "qcow2 subclusters": ("qcow2", "extended_l2=on,cluster_size=128k"),
    "vmdk stream": ("vmdk", "subformat=streamOptimized"),
    "vmdk sparse": ("vmdk", "subformat=monolithicSparse"),
    "vdi": ("vdi", ""),
    "vdi static": ("vdi", "static=on"),
    "vhd": ("vpc", "subformat=dynamic,force_size=on"),
    "vhd fixed": ("vpc", "subformat=fixed,force_size=on"),
    "vhdx": ("vhdx", ""),
    "vhdx fixed": ("vhdx", "subformat=fixed"),
}


def convert(raw: Path, target: Path, format: str, options: str) -> None:
    extra = [options] if options == "-c" else ["-o", options] if options else []
    subprocess.run(
        ["qemu-img", "convert", "-f", "raw", "-O", format, *extra, raw, target], check=True
    )


async def taken(path: Path, work: Path, index: int = 0, format: DiskFormat | None = None) -> bytes:
    """The content of a disk in a file, after it was taken out."""
    shared = work / "shared"  # whom qemu-img runs as must be able to come here
    fd = os.open(path, os.O_RDONLY)
    try:
        package = open_package(fd, path.name, format=format)
        source = package.sources[index]
        assert source is not None
        target = work / f"taken{index}.qcow2"
        await unpack_disk(fd, source, package.members, shared, target, no_progress)
    finally:
        os.close(fd)
        shutil.rmtree(shared, ignore_errors=True)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)
    raw = work / "taken.raw"
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, raw], check=True)
    return raw.read_bytes()


@pytest.mark.parametrize("name", FORMATS)
async def test_every_format_comes_in(name: str, tmp_path: Path) -> None:
    format, options = FORMATS[name]
    raw = packages.content(SIZE)
    (tmp_path / "it.raw").write_bytes(raw)
    convert(tmp_path / "it.raw", tmp_path / "disk", format, options)
    stated = DiskFormat(format) if name in ("raw", "vhd fixed") else None
    found = await taken(tmp_path / "disk", tmp_path, format=stated)
    assert len(found) == SIZE
    assert found == raw


@pytest.mark.parametrize("kind", ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"])
async def test_vmdk_in_several_files(kind: str, tmp_path: Path) -> None:
    raw = packages.content(SIZE)
    (tmp_path / "it.raw").write_bytes(raw)
    there = tmp_path / "there"
    there.mkdir()
    convert(tmp_path / "it.raw", there / "disk.vmdk", "vmdk", f"subformat={kind}")
    files = {path.name: path.read_bytes() for path in sorted(there.iterdir())}
    (tmp_path / "set.tar").write_bytes(archive(files))
    assert await taken(tmp_path / "set.tar", tmp_path) == raw
    # One of them names what is not there, or more than there is.
    text = files["disk.vmdk"]
    extent = next(name for name in files if name != "disk.vmdk")
    for spoilt in (
        text.replace(extent.encode(), b"/etc/shadow"),
        text.replace(b"RW 16384", b"RW 99999"),
        text.replace(b"parentCID=ffffffff", b"parentCID=12345678"),
    ):
        assert spoilt != text
        (tmp_path / "set.tar").write_bytes(archive({**files, "disk.vmdk": spoilt}))
        with pytest.raises(HostileImageError):
            await taken(tmp_path / "set.tar", tmp_path)


async def test_all_disks_of_a_package(tmp_path: Path) -> None:
    path = tmp_path / "it.ova"
    path.write_bytes(packages.vmware(tmp_path, (8 * MiB, 3 * MiB)))
    assert await taken(path, tmp_path, 0) == packages.content(8 * MiB, 1)
    assert await taken(path, tmp_path, 1) == packages.content(3 * MiB, 2)


def packed(tmp_path: Path, inner: bytes, capacity: int) -> Path:
    """A package whose disk is compressed as a whole (DSP0243, section 6.2)."""
    files = unpacked(packages.vmware(tmp_path, (SIZE,)))
    name = "Web Server 01-disk1.vmdk"
    data = gzip.compress(inner)
    text = files["Web Server 01.ovf"].decode()
    text = text.replace(f'ovf:size="{len(files[name])}"', f'ovf:size="{len(data)}"')
    text = text.replace('ovf:id="file1"', 'ovf:id="file1" ovf:compression="gzip"')
    text = text.replace(f'ovf:capacity="{SIZE // MiB}"', f'ovf:capacity="{capacity // MiB}"')
    files["Web Server 01.ovf"], files[name] = text.encode(), data
    path = tmp_path / "it.ova"
    path.write_bytes(resigned(files))
    return path


async def test_compressed_disks_and_bombs(tmp_path: Path) -> None:
    raw = packages.content(SIZE)
    inner = packages.stream(raw, tmp_path)
    assert await taken(packed(tmp_path, inner, SIZE), tmp_path) == raw
    found = await taken(packed(tmp_path, inner, 2 * SIZE), tmp_path)  # it is said to be larger
    assert found == raw.ljust(2 * SIZE, b"\0")
    with pytest.raises(HostileImageError, match="larger"):
        await taken(packed(tmp_path, inner, SIZE // 2), tmp_path)
    bomb = packed(tmp_path, bytes(400 * MiB), SIZE)
    with pytest.raises(TooLargeError):
        await taken(bomb, tmp_path)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("name", ["qcow2", "vmdk stream", "vmdk sparse", "vdi", "vhd", "vhdx"])
async def test_disks_that_end_early_are_refused(name: str, tmp_path: Path) -> None:
    format, options = FORMATS[name]
    (tmp_path / "it.raw").write_bytes(packages.content(SIZE))
    convert(tmp_path / "it.raw", tmp_path / "disk", format, options)
    length = (tmp_path / "disk").stat().st_size
    for share in (0.7, 0.3):
        os.truncate(tmp_path / "disk", int(length * share))
        with pytest.raises(HostileImageError):
            await taken(tmp_path / "disk", tmp_path)
