"""Disks as streams: what goes out comes back, and QEMU reads it as we do."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undercroft.model.errors import HostileImageError, UndercroftError
from undercroft.storage.formats.common import Image
from undercroft.storage.streams.extents import Piece
from undercroft.storage.streams.qcow2_out import CLUSTER, Qcow2Writer
from undercroft.storage.streams.vmdk_in import read_header, unpack_stream
from undercroft.storage.streams.vmdk_out import GRAIN, write_stream
from undercroft.storage.threads import Stop, Stopped

needs_qemu_img = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="needs qemu-img")


def as_stream(path: Path, raw: bytes, pieces: list[Piece] | None = None) -> Path:
    """Writes a disk with this content as a stream."""
    source = path.with_suffix(".raw")
    source.write_bytes(raw)
    pieces = [Piece(0, len(raw), 0, 0)] if pieces is None else pieces
    fd, target = os.open(source, os.O_RDONLY), os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    digest = hashlib.sha256()
    try:
        size = write_stream(
            target, 0, len(raw), pieces, [fd], digest, Stop(), lambda done: None, cid=7
        )
    finally:
        os.close(fd)
        os.close(target)
    assert path.stat().st_size == size
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
    return path


def back(path: Path, target: Path) -> None:
    """Unpacks a stream."""
    fd = os.open(path, os.O_RDONLY)
    out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        image = Image(fd, path.stat().st_size)
        header = read_header(image)
        assert header is not None
        unpack_stream(image, header, out, target.parent, Stop(), lambda fraction: None)
    finally:
        os.close(fd)
        os.close(out)


def content(target: Path, size: int) -> bytes:
    """What QEMU reads of a qcow2."""
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", target], check=True)
    raw = target.with_suffix(".back")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", target, raw], check=True)
    return raw.read_bytes()[:size]


@st.composite
def disks(draw: st.DrawFn) -> bytes:
    """Small disks with holes, data that is easy and data that is hard to compress."""
    size = draw(st.integers(1, 40 * GRAIN // 512)) * 512
    raw = bytearray(size)
    for _ in range(draw(st.integers(0, 6))):
        start = draw(st.integers(0, size - 1))
        length = draw(st.integers(1, 3 * GRAIN))
        piece = random.Random(draw(st.integers(0, 9))).randbytes(length)
        if draw(st.booleans()):
            piece = b"abc" * (length // 3 + 1)
        raw[start : start + length] = piece[: max(0, min(length, size - start))]
    return bytes(raw[:size])


@needs_qemu_img
@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(raw=disks())
def test_there_and_back(tmp_path: Path, raw: bytes) -> None:
    stream = as_stream(tmp_path / "a.vmdk", raw)
    back(stream, tmp_path / "b.qcow2")
    assert content(tmp_path / "b.qcow2", len(raw)) == raw


@needs_qemu_img
def test_qemu_reads_what_we_write_and_we_read_what_it_writes(tmp_path: Path) -> None:
    raw = random.Random(1).randbytes(5 * GRAIN + 512) + bytes(600 * GRAIN) + b"end".ljust(512)
    stream = as_stream(tmp_path / "a.vmdk", raw)
    convert: list[str | Path] = [
        "qemu-img",
        "convert",
        "-f",
        "vmdk",
        "-O",
        "raw",
        stream,
        tmp_path / "q.raw",
    ]
    subprocess.run(convert, check=True)
    assert (tmp_path / "q.raw").read_bytes() == raw
    source = tmp_path / "a.raw"
    options = ["-O", "vmdk", "-o", "subformat=streamOptimized"]
    theirs = tmp_path / "theirs.vmdk"
    subprocess.run(["qemu-img", "convert", "-f", "raw", *options, source, theirs], check=True)
    back(theirs, tmp_path / "b.qcow2")
    assert content(tmp_path / "b.qcow2", len(raw)) == raw


def test_only_what_has_data_is_looked_at(tmp_path: Path) -> None:
    raw = b"x" * GRAIN + bytes(GRAIN) + b"y" * GRAIN
    pieces = [Piece(0, GRAIN, 0, 0), Piece(2 * GRAIN, GRAIN, 0, 2 * GRAIN)]
    assert as_stream(tmp_path / "a.vmdk", raw, pieces).read_bytes() == (
        as_stream(tmp_path / "b.vmdk", raw).read_bytes()
    )


def test_it_can_be_stopped(tmp_path: Path) -> None:
    stop = Stop()
    stop.set()
    source = tmp_path / "raw"
    source.write_bytes(b"x" * GRAIN)
    with source.open("rb") as file, (tmp_path / "out").open("wb") as target:
        pieces = [Piece(0, GRAIN, 0, 0)]
        with pytest.raises(Stopped):
            write_stream(
                target.fileno(), 0, GRAIN, pieces, [file.fileno()], hashlib.sha256(), stop,
                lambda done: None, cid=1,
            )  # fmt: skip


def spoil(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize(
    ("at", "data"),
    [
        (128 * 512, struct.pack("<Q", 1 << 40)),  # a grain's place on the disk
        (128 * 512 + 8, struct.pack("<I", 1 << 31)),  # its length
        (128 * 512 + 8, struct.pack("<I", 10)),  # cut off
        (128 * 512 + 12, b"\0\0\0\0"),  # its content
    ],
)
def test_a_damaged_grain_is_refused(tmp_path: Path, at: int, data: bytes) -> None:
    stream = as_stream(tmp_path / "a.vmdk", random.Random(2).randbytes(4 * GRAIN))
    spoil(stream, at, data)
    with pytest.raises(HostileImageError):
        back(stream, tmp_path / "b.qcow2")


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_whatever_is_changed_the_error_is_clear(tmp_path: Path, data: st.DataObject) -> None:
    stream = as_stream(tmp_path / "a.vmdk", random.Random(3).randbytes(3 * GRAIN))
    size = stream.stat().st_size
    for _ in range(data.draw(st.integers(1, 4))):
        places = st.one_of(
            st.integers(0, 1024), st.integers(128 * 512, 128 * 512 + 32),
            st.integers(size - 8192, size - 8),
        )  # fmt: skip
        spoil(stream, data.draw(places), data.draw(st.binary(min_size=1, max_size=8)))
    if data.draw(st.booleans()):
        os.truncate(stream, data.draw(st.integers(1024, size)))
    fd = os.open(stream, os.O_RDONLY)
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        image = Image(fd, stream.stat().st_size)
        header = read_header(image)
        if header is not None and header.capacity < 1 << 20:
            unpack_stream(image, header, out, tmp_path, Stop(), lambda fraction: None)
    except UndercroftError:
        pass
    finally:
        os.close(fd)
        os.close(out)


@needs_qemu_img
def test_a_large_qcow2_has_all_its_counts(tmp_path: Path) -> None:
    size = 3 << 40  # many tables
    path = tmp_path / "large.qcow2"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    writer = Qcow2Writer(fd, size)
    places = [0, 1, 8191, 8192, 5_000_000, size // CLUSTER - 1]
    writer.write([(place, bytes([n + 1]) * CLUSTER) for n, place in enumerate(places)])
    writer.finish()
    os.close(fd)
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    for n, place in enumerate(places):
        command: list[str | Path] = [
            "qemu-io",
            "-f",
            "qcow2",
            "-c",
            f"read -P {n + 1} {place * CLUSTER} 64k",
            path,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "failed" not in done.stdout
    with pytest.raises(UndercroftError):
        writer.write([(3, bytes(CLUSTER))])
