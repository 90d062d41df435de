"""Which files can be in a CD-ROM drive."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from undercroft.hypervisor.medium import check_medium, open_medium
from undercroft.model.errors import InvalidError, NotFoundError

HEAD = bytes(16 * 2048)


def disc(path: Path, identifier: bytes = b"CD001") -> Path:
    path.write_bytes(HEAD + b"\x01" + identifier + bytes(2048))
    return path


@pytest.mark.parametrize("identifier", [b"CD001", b"BEA01"])
def test_a_disc_is_opened_for_reading_only(tmp_path: Path, identifier: bytes) -> None:
    path = disc(tmp_path / "a.iso", identifier)
    link = tmp_path / "link.iso"
    link.symlink_to(path)
    for name in (path, link):
        descriptor = open_medium(str(name))
        try:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.write(descriptor, b"x")
        finally:
            os.close(descriptor)


@pytest.mark.parametrize(
    "data", [b"", b"CD001" * 40000, HEAD + b"\x01CD00", HEAD + b"CD001", b"QFI\xfb" + HEAD]
)
def test_what_is_no_disc_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.iso"
    path.write_bytes(data)
    with pytest.raises(InvalidError, match="not an image of a disc"):
        check_medium(str(path))


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (str(fifo), str(tmp_path), "/dev/zero"):
        with pytest.raises(InvalidError, match="not a plain file"):
            check_medium(path)


def test_what_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    path = disc(tmp_path / "a.iso")
    for gone in (tmp_path / "none.iso", path / "below"):
        with pytest.raises(NotFoundError, match="there is no file"):
            check_medium(str(gone))
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(InvalidError, match="cannot be read"):
        check_medium(str(loop))
    path.chmod(0)
    if os.geteuid() != 0:
        with pytest.raises(InvalidError, match="cannot be read"):
            check_medium(str(path))
