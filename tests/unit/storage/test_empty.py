"""Empty qcow2 files: what QEMU's own tools and our own inspection say of them."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from undercroft.model.image import DiskFormat
from undercroft.model.units import GiB, KiB, TiB
from undercroft.storage.formats.common import Limits
from undercroft.storage.formats.empty import CLUSTER, empty_size, write_empty
from undercroft.storage.formats.inspect import inspect

SECTORS = st.one_of(
    st.integers(1, 4 * TiB // 512),
    st.integers(1, 64 * TiB // GiB).flatmap(
        lambda n: st.sampled_from([n * GiB // 512 - 1, n * GiB // 512, n * GiB // 512 + 1])
    ),
)


@settings(max_examples=15, deadline=None)
@given(SECTORS, st.booleans(), st.booleans())
def test_qemu_finds_nothing_wrong(
    tmp_path_factory: pytest.TempPathFactory, sectors: int, overlay: bool, encrypted: bool
) -> None:
    path = tmp_path_factory.mktemp("empty") / "a.qcow2"
    size = min(sectors * 512, 64 * TiB)
    key = path.with_name("key")
    key.write_bytes(b"secret")
    base = ("/images/base.raw", "raw") if overlay else None
    write_empty(path, size, base, b"secret" if encrypted else None)
    assert path.stat().st_size == empty_size(size, encrypted=encrypted)
    asked = subprocess.run(
        ["qemu-img", "info", "-f", "qcow2", "--output=json", path], capture_output=True, check=True
    )
    told = json.loads(asked.stdout)
    assert told["virtual-size"] == size
    assert told["cluster-size"] == CLUSTER
    assert told["format-specific"]["data"]["compat"] == "1.1"
    assert told.get("backing-filename") == ("/images/base.raw" if overlay else None)
    assert told.get("backing-filename-format") == ("raw" if overlay else None)
    assert told.get("encrypted", False) == encrypted
    if encrypted:
        node = f"driver=qcow2,file.filename={path},encrypt.format=luks,encrypt.key-secret=k"
        node += ",backing=" if overlay else ""
        secret = ["--object", f"secret,id=k,file={key}"]
        subprocess.run(["qemu-img", "check", "-q", *secret, "--image-opts", node], check=True)
    elif not overlay:
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


@pytest.mark.parametrize("size", [512, 64 * KiB, GiB, 512 * GiB + 512, 4 * TiB])
def test_what_is_written_is_read_again(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.qcow2"
    write_empty(path, size)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert (
            inspect(fd, DiskFormat.QCOW2, Limits()).virtual_size == size
        )  # our own parser takes it, too
    finally:
        os.close(fd)
    at = size - 512
    for command in (f"write -P 0x5a {at} 512", f"read -P 0x5a {at} 512"):
        done = subprocess.run(
            ["qemu-io", "-f", "qcow2", "-c", command, path], capture_output=True, text=True
        )
        assert "Pattern verification failed" not in done.stdout
        assert done.returncode == 0, done.stderr
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
    assert path.stat().st_size > empty_size(size)  # one that was written to is longer


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        write_empty(path, GiB)
    assert path.read_bytes() == b"mine"
