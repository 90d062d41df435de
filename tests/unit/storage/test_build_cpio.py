import io
import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.storage.build.cpio import CpioWriter


def read(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """The entries of a newc archive: mode and content by path, as the kernel reads them."""
    entries: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length - 1].decode()
        at += (110 + length + 3) & ~3
        if name == "TRAILER!!!":
            return entries
        entries[name] = (mode, archive[at : at + size])
        at += (size + 3) & ~3


@given(st.dictionaries(st.text("abcde", min_size=1, max_size=9), st.binary(max_size=40)))
def test_files_come_back(contents: dict[str, bytes]):
    out = io.BytesIO()
    writer = CpioWriter(out)
    for name, data in contents.items():
        writer.file(f"d/{name}", data, 0o600)
    writer.close()
    entries = read(out.getvalue())
    assert {name: data for name, (mode, data) in entries.items() if name != "d"} == {
        f"d/{name}": data for name, data in contents.items()
    }
    assert all(mode == 0o100600 for name, (mode, _) in entries.items() if name != "d")


def test_parents_links_and_devices():
    out = io.BytesIO()
    writer = CpioWriter(out)
    writer.symlink("usr/bin/sh", "/bin/busybox")
    writer.character_device("dev/console", 5, 1)
    writer.directory("usr")
    writer.close()
    entries = read(out.getvalue())
    assert list(entries) == ["usr", "usr/bin", "usr/bin/sh", "dev", "dev/console"]
    assert entries["usr/bin/sh"] == (0o120777, b"/bin/busybox")
    assert entries["dev/console"][0] == 0o020600


def test_a_path_twice_is_refused():
    writer = CpioWriter(io.BytesIO())
    writer.file("a", b"")
    with pytest.raises(ValueError, match="already"):
        writer.file("a", b"")


@pytest.mark.skipif(shutil.which("cpio") is None, reason="needs cpio")
def test_cpio_reads_it():
    out = io.BytesIO()
    writer = CpioWriter(out)
    writer.file("etc/name", b"tiny", 0o644)
    writer.close()
    listing = subprocess.run(
        ["cpio", "-t"], input=out.getvalue(), capture_output=True, check=True
    ).stdout
    assert listing.split() == [b"etc", b"etc/name"]
