import asyncio
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.errors import DataCorruptError, InvalidError, NotFoundError
from undercroft.model.image import ImageContent, ImageDefaults
from undercroft.storage.images import MANIFEST, ImageStore, manifest_digest

CONTENT = ImageContent(kernel="kernel", initrd="initrd", os="test")


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    (tmp_path / "tmp").mkdir()
    return ImageStore(tmp_path / "images", tmp_path / "tmp")


def made(store: ImageStore, **files: bytes) -> Path:
    directory = store.new_directory()
    for name, data in (files or {"kernel": b"k" * 100, "initrd": b"i" * 200}).items():
        (directory / name).write_bytes(data)
    return directory


async def test_add_load_verify_remove(store: ImageStore):
    seen: list[float] = []
    digest, content = await store.add(made(store), CONTENT, lambda f, _: seen.append(f))
    assert seen[-1] == 1.0
    assert content.files["initrd"].size == 200
    assert digest == manifest_digest(content)
    assert await store.load(digest) == content
    assert await store.verify(digest) == content
    assert await store.digests() == [digest]
    assert await store.usage(digest) > 0
    for path in store.path(digest).iterdir():
        assert path.stat().st_mode & 0o777 == 0o444
    assert list(store.tmp.iterdir()) == []
    await store.remove(digest)
    await store.remove(digest)
    assert await store.digests() == []
    assert list(store.tmp.iterdir()) == []
    with pytest.raises(NotFoundError):
        await store.load(digest)
    with pytest.raises(NotFoundError):
        await store.usage(digest)


async def test_same_content_is_kept_once(store: ImageStore):
    first, _ = await store.add(made(store), CONTENT)
    second, _ = await store.add(made(store), CONTENT)
    assert first == second
    assert list(store.tmp.iterdir()) == []
    other, _ = await store.add(made(store), msgspec.structs.replace(CONTENT, os="other"))
    assert other != first


@pytest.mark.parametrize("name", ["kernel", "initrd", MANIFEST])
async def test_every_change_is_found(store: ImageStore, name: str):
    digest, _ = await store.add(made(store), CONTENT)
    path = store.path(digest) / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(DataCorruptError) as caught:
        await store.verify(digest)
    assert caught.value.object == digest


async def test_missing_and_shortened_files_are_found_without_reading_all(store: ImageStore):
    digest, _ = await store.add(made(store), CONTENT)
    path = store.path(digest) / "kernel"
    path.chmod(0o644)
    os.truncate(path, 10)
    with pytest.raises(DataCorruptError, match="size"):
        await store.verify(digest, content=False)
    path.unlink()
    with pytest.raises(DataCorruptError, match="missing"):
        await store.verify(digest, content=False)


async def test_what_is_not_an_image(store: ImageStore):
    with pytest.raises(InvalidError, match="no file"):
        await store.add(made(store, kernel=b"k"), CONTENT)
    with pytest.raises(InvalidError, match="without any file"):
        await store.add(store.new_directory(), ImageContent())
    with pytest.raises(InvalidError, match="its own"):
        await store.add(made(store, **{MANIFEST: b"{}"}), ImageContent())
    directory = made(store)
    (directory / "link").symlink_to("/etc/passwd")
    with pytest.raises(InvalidError, match="link"):
        await store.add(directory, CONTENT)


@given(st.text(max_size=80))
def test_no_path_leads_elsewhere(text: str):
    store = ImageStore(Path("/images"), Path("/tmp"))
    try:
        path = store.path(text)
    except InvalidError:
        return
    assert path.parent == store.images


@pytest.mark.parametrize("digest", ["..", "../../etc", "a" * 63, "A" * 64, "/etc/passwd", ""])
async def test_nonsense_digests(store: ImageStore, digest: str):
    with pytest.raises(InvalidError):
        await store.load(digest)
    with pytest.raises(InvalidError):
        await store.remove(digest)


async def test_orphans(store: ImageStore):
    assert await store.orphans(set()) == []
    digest, _ = await store.add(made(store), CONTENT)
    (store.images / "stray").mkdir()
    assert await store.orphans({digest}) == [store.images / "stray"]
    assert await store.orphans(set()) == sorted([store.images / "stray", store.path(digest)])


async def test_cancelled_add_leaves_no_image(store: ImageStore):
    directory = made(store, kernel=bytes(64 << 20), initrd=b"")
    task = asyncio.create_task(store.add(directory, CONTENT))
    await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await store.digests() == []


def test_digest_covers_what_is_said_about_the_files():
    base = manifest_digest(CONTENT)
    for changed in (
        msgspec.structs.replace(CONTENT, kernel_arguments="init=/bin/sh"),
        msgspec.structs.replace(CONTENT, defaults=ImageDefaults(cpus=2)),
    ):
        assert manifest_digest(changed) != base
