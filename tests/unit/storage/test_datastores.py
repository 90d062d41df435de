"""The directory driver: a datastore is what has its marker, and copies are whole."""

from __future__ import annotations

import errno
import fcntl
import os
import random
from pathlib import Path

import pytest

from undercroft.model.errors import AlreadyExistsError, DataError, UnavailableError
from undercroft.storage import reflink
from undercroft.storage.datastores.directory import (
    HALF,
    MARKER,
    DirectoryDriver,
    forget,
    prepare,
    sweep,
)
from undercroft.storage.reflink import copy_file
from undercroft.storage.threads import Stop
from undercroft.storage.volumes import LayerFile

MiB = 1 << 20


def unknown(id: str) -> bool:
    return False


@pytest.fixture
def place(tmp_path: Path) -> Path:
    path = tmp_path / "srv" / "vms"
    prepare(path, "ds-1", "host-1", unknown)
    return path


def driver(path: Path, id: str = "ds-1") -> DirectoryDriver:
    return DirectoryDriver(path, path / HALF, id, "datastore fast")


async def test_an_empty_mount_point_is_not_taken_for_an_empty_datastore(place: Path) -> None:
    store = driver(place)
    await store.make("layer-1.qcow2", MiB)
    assert await store.names() == ["layer-1.qcow2"]
    away = place.rename(place.with_name("away"))
    place.mkdir()  # what is beneath the mount
    for wanted in (
        store.check(),
        store.names(),
        store.space(),
        store.remove("layer-1.qcow2"),
        store.make("layer-2.qcow2", MiB),
    ):
        with pytest.raises(UnavailableError, match="not mounted"):
            await wanted
    assert list(place.iterdir()) == []
    place.rmdir()
    away.rename(place)
    assert await store.names() == ["layer-1.qcow2"]
    with pytest.raises(UnavailableError):
        await driver(place, "ds-2").check()


async def test_made_and_removed_again_and_again(place: Path) -> None:
    store = driver(place)
    await store.make("layer-1.raw", 8 * MiB, format="raw")
    await store.make("layer-2.qcow2", 8 * MiB, base=(store.path("layer-1.raw"), "raw"))
    await store.copy([LayerFile(store.path("layer-1.raw"), "raw")], "layer-3.qcow2", 8 * MiB)
    assert await store.names() == ["layer-1.raw", "layer-2.qcow2", "layer-3.qcow2"]
    for name in await store.names():
        await store.remove(name)
        await store.remove(name)
    assert await store.names() == []
    assert list((place / HALF).iterdir()) == []
    space = await store.space()
    assert 0 < space.free <= space.capacity


def test_a_directory_is_one_datastore(place: Path) -> None:
    with pytest.raises(AlreadyExistsError, match="already"):
        prepare(place, "ds-2", "host-1", {"ds-1"}.__contains__)
    with pytest.raises(AlreadyExistsError, match="another installation"):
        prepare(place, "ds-2", "host-2", unknown)
    # What a daemon left that died before it wrote down that there is one.
    (place / HALF / "volume-x").write_bytes(b"x")
    (place / HALF / "import-x").mkdir()
    (place / HALF / "import-x" / "part").write_bytes(b"x")
    prepare(place, "ds-2", "host-1", unknown)
    assert not list((place / HALF).iterdir())
    forget(place, "ds-1")
    assert (place / MARKER).exists()  # it is another's by now
    (place / HALF / "volume-x").write_bytes(b"x")
    sweep(place, "ds-1")
    assert list((place / HALF).iterdir())
    forget(place, "ds-2")
    assert list(place.iterdir()) == []


def test_disks_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "web.qcow2").write_bytes(b"x")
    with pytest.raises(DataError, match="none of ours"):
        prepare(tmp_path, "ds-1", "host-1", unknown)
    assert [path.name for path in tmp_path.iterdir()] == ["web.qcow2"]
    with pytest.raises(DataError, match="cannot be a datastore"):
        prepare(tmp_path / "web.qcow2", "ds-1", "host-1", unknown)


@pytest.mark.parametrize("said", [b"", b"[]", b"{", b'"x"', b"\xff", b'{"id": 3}'])
async def test_nonsense_in_the_marker_is_no_datastore(place: Path, said: bytes) -> None:
    (place / MARKER).write_bytes(said)
    with pytest.raises(UnavailableError):
        await driver(place).check()


# -- copies ---------------------------------------------------------------------------------


def sparse(path: Path, rng: random.Random) -> None:
    """A file with data here and there."""
    with path.open("wb") as file:
        for _ in range(rng.randrange(6)):
            file.seek(rng.randrange(64) * 4096)
            file.write(rng.randbytes(rng.randrange(1, 20_000)))
        file.truncate(rng.randrange(400_000))


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_a_copy_is_the_same_with_its_holes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: bool, seed: int
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    sparse(source, random.Random(seed))
    if not kernel:  # one that cannot copy between these two

        def cannot(*_: object) -> int:
            raise OSError(errno.EXDEV, "no")

        monkeypatch.setattr(os, "copy_file_range", cannot)
    seen: list[float] = []
    copy_file(source, target, Stop(), seen.append)
    assert target.read_bytes() == source.read_bytes()
    assert target.stat().st_blocks <= source.stat().st_blocks + 8
    assert all(0 <= share <= 1 for share in seen)


def test_an_error_that_is_none_of_the_kinds_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "source").write_bytes(b"x")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(fcntl, "ioctl", broken)
    with pytest.raises(OSError, match="broken"):
        copy_file(tmp_path / "source", tmp_path / "target", Stop())


def test_blocks_are_shared_where_the_kernel_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which request that is, and that nothing is copied besides."""
    (tmp_path / "source").write_bytes(b"x" * 5000)
    asked = []

    def shares(target: int, request: int, source: int) -> int:
        asked.append((target, request, source))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", shares)
    assert copy_file(tmp_path / "source", tmp_path / "target", Stop())
    assert [request for _, request, _ in asked] == [reflink.FICLONE]
    assert (tmp_path / "target").stat().st_size == 0
