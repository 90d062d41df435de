"""Small answers kept in files."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.hypervisor import probe_cache


async def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "there.json"
    assert await probe_cache.load(path, dict[str, int]) is None
    await probe_cache.save(path, {"a": 1})
    await probe_cache.save(path, {"a": 2})
    assert await probe_cache.load(path, dict[str, int]) == {"a": 2}
    assert os.listdir(path.parent) == ["there.json"]


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"a": "text"}', b"\xff\xfe", b"[" * 100_000])
async def test_garbage_is_nothing(tmp_path: Path, garbage: bytes) -> None:
    path = tmp_path / "cache.json"
    path.write_bytes(garbage)
    assert await probe_cache.load(path, dict[str, int]) is None


@given(st.binary(max_size=200))
async def test_any_bytes_are_survived(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(garbage)
    loaded = await probe_cache.load(path, dict[str, int])
    assert loaded is None or isinstance(loaded, dict)


async def test_a_place_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    await probe_cache.save(tmp_path / "file" / "cache.json", {"a": 1})
    (tmp_path / "directory").mkdir()
    await probe_cache.save(tmp_path / "directory", {"a": 1})
    assert sorted(os.listdir(tmp_path)) == ["directory", "file"]


def test_identity_is_of_the_file_not_of_the_name(tmp_path: Path) -> None:
    program, link = tmp_path / "program", tmp_path / "link"
    assert probe_cache.file_identity(program) == ""
    program.write_text("one")
    link.symlink_to(program)
    first = probe_cache.file_identity(program)
    assert first
    assert probe_cache.file_identity(link) == first
    other = tmp_path / "other"
    other.write_text("two")
    os.replace(other, program)
    assert probe_cache.file_identity(program) not in ("", first)
