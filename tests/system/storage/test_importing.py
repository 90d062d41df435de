"""Importing images of every format with the real qemu-img; hostile ones; a full disk."""

import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.storage import samples
from undercroft.model.errors import (
    ChecksumError,
    HostileImageError,
    InvalidError,
    NotFoundError,
)
from undercroft.model.image import DiskFormat, ImageContent
from undercroft.storage.formats import Limits
from undercroft.storage.images import ImageStore
from undercroft.storage.importing import ImportOptions, import_image

SIZE = 3 << 20


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    (tmp_path / "data/tmp").mkdir(parents=True)
    return ImageStore(tmp_path / "data/images", tmp_path / "data/tmp")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    data = b"boot" + os.urandom(100_000) + bytes(1 << 20)
    path.write_bytes(data + bytes(SIZE - len(data)))
    return path


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def content_of_disk(store: ImageStore, digest: str, tmp_path: Path) -> bytes:
    out = tmp_path / "back.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", store.path(digest) / "disk.qcow2", out)
    return out.read_bytes()


def left_over(store: ImageStore) -> list[Path]:
    return list(store.tmp.iterdir())


@pytest.mark.parametrize(
    ("format", "options", "stated"),
    [
        ("raw", [], True),
        ("qcow2", [], False),
        ("qcow2", ["-c"], False),
        ("qcow2", ["-o", "compat=0.10,cluster_size=4096"], False),
        ("qcow2", ["-o", "extended_l2=on,cluster_size=128k"], False),
        ("qcow2", ["-o", "compression_type=zstd", "-c"], False),
        ("vmdk", [], False),
        ("vmdk", ["-o", "subformat=streamOptimized"], False),
        ("vpc", ["-o", "force_size=on"], False),
        ("vpc", ["-o", "subformat=fixed,force_size=on"], True),
        ("vhdx", [], False),
        ("vdi", [], False),
    ],
)
async def test_formats(
    store: ImageStore, raw: Path, tmp_path: Path, format: str, options: list[str], stated: bool
):
    source = tmp_path / f"disk.{format}.img"
    qemu_img("convert", "-f", "raw", "-O", format, *options, raw, source)
    seen: list[float] = []
    digest, content = await import_image(
        store,
        source,
        ImportOptions(
            format=DiskFormat(format) if stated else None, content=ImageContent(os="test")
        ),
        lambda fraction, _: seen.append(fraction),
    )
    back = content_of_disk(store, digest, tmp_path)
    assert back[:SIZE] == raw.read_bytes()
    assert not any(back[SIZE:])
    assert content.virtual_size == len(back)
    assert content.os == "test"
    assert content.disk_format is DiskFormat.QCOW2
    assert list(content.files) == ["disk.qcow2"]
    disk = store.path(digest) / "disk.qcow2"
    assert disk.stat().st_uid == os.geteuid()
    assert disk.stat().st_mode & 0o777 == 0o444
    assert source.exists()
    assert left_over(store) == []
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    await store.verify(digest)


async def test_checksum_and_taking(store: ImageStore, raw: Path):
    right = hashlib.sha256(raw.read_bytes()).hexdigest()
    for take in (False, True):
        with pytest.raises(ChecksumError):
            await import_image(
                store,
                raw,
                ImportOptions(format=DiskFormat.RAW, sha256="0" * 64, take=take),
            )
    assert left_over(store) == []
    options = ImportOptions(format=DiskFormat.RAW, sha256=right.upper(), take=True)
    digest, _ = await import_image(store, raw, options)
    assert not raw.exists()
    assert await store.digests() == [digest]


async def test_hostile_images_are_refused_and_leave_nothing(store: ImageStore, tmp_path: Path):
    source = tmp_path / "hostile"
    hostile = [
        samples.qcow2(backing=b"/etc/passwd"),
        samples.qcow2(size=1 << 60),
        samples.qcow2(extensions=samples.extension(0x44415441, b"/etc/shadow"), incompatible=4),
        samples.qcow2()[:70_000],
        samples.vmdk(capacity=0),
    ]
    for image in hostile:
        source.write_bytes(image)
        with pytest.raises(HostileImageError) as caught:
            await import_image(store, source, ImportOptions())
        assert caught.value.action
        assert left_over(store) == []
    assert await store.digests() == []


async def test_wrong_format_stated(store: ImageStore, raw: Path, tmp_path: Path):
    for format in set(DiskFormat) - {DiskFormat.RAW}:
        with pytest.raises(HostileImageError):
            await import_image(store, raw, ImportOptions(format=format))
    # A qcow2 that is said to be raw is raw: the guest gets the very bytes, nothing is followed.
    source = tmp_path / "q"
    source.write_bytes(samples.qcow2(backing=b"/etc/passwd"))
    digest, content = await import_image(store, source, ImportOptions(format=DiskFormat.RAW))
    assert content_of_disk(store, digest, tmp_path) == source.read_bytes()
    assert content.virtual_size == source.stat().st_size


async def test_what_is_not_a_file(store: ImageStore, tmp_path: Path):
    with pytest.raises(NotFoundError):
        await import_image(store, tmp_path / "missing", ImportOptions())
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(InvalidError):
            await import_image(store, path, ImportOptions(format=DiskFormat.RAW))
    assert left_over(store) == []


async def test_size_limit(store: ImageStore, raw: Path):
    options = ImportOptions(format=DiskFormat.RAW, limits=Limits(virtual_size=1 << 20))
    with pytest.raises(HostileImageError, match="limit"):
        await import_image(store, raw, options)


async def test_cancelled_import_leaves_nothing(store: ImageStore, tmp_path: Path):
    source = tmp_path / "large"
    with source.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    for moment in ("reading the image", "converting"):
        reached = asyncio.Event()
        loop = asyncio.get_running_loop()

        def watch(
            fraction: float,
            phase: str,
            moment: str = moment,
            reached: asyncio.Event = reached,
            loop: asyncio.AbstractEventLoop = loop,
        ) -> None:
            if phase == moment:
                loop.call_soon_threadsafe(reached.set)

        task = asyncio.create_task(
            import_image(store, source, ImportOptions(format=DiskFormat.RAW), watch)
        )
        await reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert left_over(store) == []
        assert await store.digests() == []


FULL_DISK = """
import asyncio, sys
from pathlib import Path
from undercroft.model.errors import NoSpaceError
from undercroft.model.image import DiskFormat
from undercroft.storage import files, importing
from undercroft.storage.images import ImageStore

files.RESERVE = int(sys.argv[3])
if sys.argv[4] == "blind":  # as if the disk had filled up only after the check
    importing.require_space = lambda *_: None
disk = Path(sys.argv[1])
(disk / "tmp").mkdir(exist_ok=True)
store = ImageStore(disk / "images", disk / "tmp")
try:
    asyncio.run(
        importing.import_image(
            store, Path(sys.argv[2]), importing.ImportOptions(format=DiskFormat(sys.argv[5]))
        )
    )
except NoSpaceError as error:
    left = [str(path) for path in disk.rglob("*") if path.is_file()]
    print(error.code, "left:", left, "action:", bool(error.action))
"""


@pytest.mark.parametrize("size", ["8m", "34m"])
@pytest.mark.parametrize("mode", ["checked", "blind"])
@pytest.mark.parametrize("format", ["raw", "qcow2"])
async def test_full_disk(tmp_path: Path, size: str, mode: str, format: str):
    """On a disk of its own, gone with its mount namespace: too small for the copy (8 MB), or for
    copy and converted image together (34 MB)."""
    raw = tmp_path / "large.raw"
    raw.write_bytes(os.urandom(24 << 20))
    source = tmp_path / "source"
    qemu_img("convert", "-f", "raw", "-O", format, raw, source)
    disk = tmp_path / "disk"
    disk.mkdir()
    script = tmp_path / "script.py"
    script.write_text(FULL_DISK)
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    mount = f'mount -t tmpfs -o size={size},mode=0711 none "$1" && shift && exec "$@"'
    done = await asyncio.create_subprocess_exec(
        *unshare, "sh", "-c", mount, "sh", disk,
        sys.executable, script, disk, source, "0", mode, format,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    out, _ = await done.communicate()
    assert out.decode() == "no-space left: [] action: True\n"
