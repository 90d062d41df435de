"""Logs that others fill."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undercroft.hypervisor.log import BoundedLog, read_tail


@settings(deadline=None, max_examples=50)
@given(pieces=st.lists(st.binary(min_size=1, max_size=6000), max_size=40))
def test_bounded_and_the_end_is_kept(pieces: list[bytes]) -> None:
    limit = 16 << 10
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "log"
        log = BoundedLog(path, limit)
        for piece in pieces:
            assert log.write(piece)
            assert sum(entry.stat().st_size for entry in Path(directory).iterdir()) <= limit
        log.close()
        everything = b"".join(pieces)
        kept = read_tail(path, limit)
        assert everything.endswith(kept)
        # At least a segment less the piece that made it turn over.
        assert len(kept) >= min(len(everything), limit // 2 - 6000)
        assert read_tail(path, 100) == everything[-100:][-len(kept) or None :]


def test_goes_on_where_an_earlier_one_stopped(tmp_path: Path) -> None:
    for word in (b"one ", b"two ", b"three"):
        log = BoundedLog(tmp_path / "log", 1 << 16)
        log.write(word)
        log.close()
    assert read_tail(tmp_path / "log", 1000) == b"one two three"


def test_more_at_once_than_fits_keeps_the_end(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", 8192)
    log.write(b"a" * 10000 + b"end")
    log.close()
    assert read_tail(tmp_path / "log", 8192) == (b"a" * 10000 + b"end")[-4096:]


def test_never_follows_a_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "log").symlink_to(tmp_path / "victim")
    assert not BoundedLog(tmp_path / "log", 8192).write(b"x")
    assert (tmp_path / "victim").read_bytes() == b"precious"


def test_shortage_is_noted_once_it_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = BoundedLog(tmp_path / "log", 1 << 16)
    log.write(b"before ")
    real = os.write

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("undercroft.hypervisor.log.os.write", full)
    assert not log.write(b"12345")
    assert not log.write(b"678")
    assert log.lost == 8
    monkeypatch.setattr("undercroft.hypervisor.log.os.write", real)
    assert log.write(b"after")
    log.close()
    text = read_tail(tmp_path / "log", 1000)
    assert text == b"before \n[8 bytes of output lost: no space on the host]\nafter"


def test_there_never_was_one(tmp_path: Path) -> None:
    assert read_tail(tmp_path / "log", 100) == b""
