"""The catalogue: what is shipped is well-formed, what users add is checked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.storage.webserver import Page, Web, serving
from undercroft.model.errors import DataError, FetchError, NotFoundError
from undercroft.model.image import DiskFormat
from undercroft.model.units import GiB, MiB
from undercroft.storage.catalogue import (
    CatalogueEntry,
    find_entry,
    load_catalogue,
    wanted_checksum,
)
from undercroft.storage.checksums import Checksum

SHIPPED = load_catalogue()
ENTRY = f"""
["mine:1"]
url = "http://127.0.0.1/disk.qcow2"
checksum = "{"a1" * 32}"
"""


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setenv("no_proxy", "*")
    with serving() as server:
        yield server


def write(directory: Path, text: str) -> Path:
    path = directory / "catalogue.toml"
    path.write_text(text)
    return path


# -- what is shipped --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_entry_is_complete(name: str) -> None:
    entry = SHIPPED[name]
    assert entry.url.startswith("https://")
    assert re.search(r"\.(qcow2|img)(\.xz)?$", entry.url)
    assert entry.format is DiskFormat.QCOW2
    assert entry.title
    assert entry.os != "unknown"
    assert entry.user
    assert 512 * MiB <= entry.memory <= 4 * GiB
    if entry.checksum.startswith("https://"):
        # A list beside the file: what is there for one image says nothing of another's.
        assert entry.checksum.rpartition("/")[0] == entry.url.rpartition("/")[0]
    else:
        # What never changes has its checksum here; a name that moves could not.
        Checksum.parse(entry.checksum)
        assert "latest" not in entry.url


def test_the_big_distributions_are_there() -> None:
    families = {name.partition(":")[0] for name in SHIPPED}
    assert families >= {
        *("debian", "ubuntu", "fedora", "rocky", "alma", "centos"),
        *("opensuse", "arch", "alpine", "freebsd"),
    }
    assert {"debian:12-cloud", "debian:13-cloud", "ubuntu:22.04", "ubuntu:24.04"} <= set(SHIPPED)


def test_what_is_built_is_not_in_it() -> None:
    assert not {"tiny", "debian:12", "debian:13"} & set(SHIPPED)


# -- a user's own -----------------------------------------------------------------------------


def test_a_missing_file_adds_nothing(tmp_path: Path) -> None:
    assert load_catalogue(tmp_path / "catalogue.toml") == SHIPPED


def test_a_user_adds(tmp_path: Path) -> None:
    extra = 'memory = "1.5G"\nformat = "vmdk"\nfirmware = "uefi"\ncloud-init = false\n'
    entries = load_catalogue(write(tmp_path, ENTRY + extra))
    assert entries["mine:1"] == CatalogueEntry(
        name="mine:1",
        url="http://127.0.0.1/disk.qcow2",
        checksum="a1" * 32,
        memory=3 * GiB // 2,
        format=DiskFormat.VMDK,
        firmware="uefi",
        cloud_init=False,
    )
    assert {**entries, "mine:1": None} == {**SHIPPED, "mine:1": None}


def test_a_user_changes_a_key(tmp_path: Path) -> None:
    """For instance a mirror: what is checked stays as it was."""
    text = '["ubuntu:24.04"]\nurl = "http://mirror.lan/ubuntu-24.04-server-cloudimg-amd64.img"\n'
    entry = load_catalogue(write(tmp_path, text))["ubuntu:24.04"]
    assert entry.url.startswith("http://mirror.lan/")
    shipped = SHIPPED["ubuntu:24.04"]
    assert (entry.checksum, entry.user, entry.os) == (shipped.checksum, shipped.user, shipped.os)


def test_an_edit_counts_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "")
    assert load_catalogue(path) == SHIPPED
    write(tmp_path, ENTRY)
    assert "mine:1" in load_catalogue(path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("\n= 1\n", "is not TOML.*line 2"),
        ('a = "b"', "'a' outside of an entry"),
        ("[[mine]]\n", "'mine' outside of an entry"),
        ('\n\n["mine:1"]\n', r"entry 'mine:1' \(line 3\).*url"),
        (ENTRY + "speed = 1\n", r"entry 'mine:1' \(line 2\).*speed"),
        (ENTRY + "user = 7\n", r"mine:1.*str.*user"),
        (ENTRY + 'user = "Not A User"\n', "mine:1.*user"),
        (ENTRY + 'memory = "much"\n', "mine:1.*'much' is not a size"),
        (ENTRY + "memory = 1\n", "mine:1.*no sensible size"),
        (ENTRY + "memory = -1\n", "mine:1.*no sensible size"),
        (ENTRY + "memory = true\n", "mine:1.*memory"),
        (ENTRY + 'format = "iso"\n', "mine:1.*'iso'"),
        (ENTRY + 'firmware = "u-boot"\n', "mine:1.*'u-boot'"),
        (ENTRY + 'cloud-init = "yes"\n', "mine:1.*bool.*cloud-init"),
        (ENTRY + 'name = "x"\n', "mine:1.*in the brackets"),
        (ENTRY.replace("a1", "a", 1), "mine:1.*not a checksum"),
        (ENTRY.replace("http://", "file://"), "mine:1.*cannot be fetched"),
        (ENTRY.replace("127.0.0.1", "me:secret@host"), "mine:1.*password"),
        (ENTRY.replace("mine:1", "Mine 1"), "'Mine 1'.*valid name"),
        (ENTRY.replace("mine:1", "debian:12"), "built here keeps its name"),
        (ENTRY.replace("mine:1", "debian:14"), "built here keeps its name"),
        (ENTRY.replace("mine:1", "tiny"), "built here keeps its name"),
        ('["ubuntu:24.04"]\nurl = ""\n', "ubuntu:24.04.*cannot be fetched"),
    ],
)
def test_garbage_is_told_with_file_and_entry(tmp_path: Path, text: str, told: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(DataError, match=told) as caught:
        load_catalogue(path)
    assert str(path) in caught.value.message
    assert caught.value.action
    assert "secret" not in caught.value.message


def test_what_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "catalogue.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="UTF-8"):
        load_catalogue(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        load_catalogue(path)
    path.rmdir()
    path.write_text("#" * (2 * MiB))
    with pytest.raises(DataError, match="too large"):
        load_catalogue(path)
    path.write_text("x = " + "[" * 100_000)
    with pytest.raises(DataError, match="not TOML"):
        load_catalogue(path)


# -- looking things up ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "action"),
    [
        ("ubuntu", "did you mean ubuntu:"),
        ("ubunut:24.04", "did you mean ubuntu:24.04"),
        ("debian:13", "did you mean debian:13-cloud"),
        ("debian:12", "croft image build debian:12.*debian:12-cloud"),
        ("tiny", "croft image build tiny"),
        ("zzzzzz", "^see what there is with: croft image catalogue"),
    ],
)
def test_a_name_that_is_not_there(name: str, action: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        find_entry(SHIPPED, name)
    assert re.search(action, caught.value.action or "")
    assert caught.value.object == f"image {name}"


async def test_the_checksum_is_stated_or_listed(web: Web) -> None:
    stated = CatalogueEntry(name="x", url=web.url("/d/disk.qcow2"), checksum="sha512:" + "c3" * 64)
    assert await wanted_checksum(stated) == Checksum("sha512", "c3" * 64)
    assert web.requests == []
    listed = CatalogueEntry(
        name="x", url=web.url("/d/disk.qcow2?mirror=1"), checksum=web.url("/d/SHA256SUMS")
    )
    web.pages["/d/SHA256SUMS"] = Page(f"{'b2' * 32}  other\n{'a1' * 32} *disk.qcow2\n".encode())
    assert await wanted_checksum(listed) == Checksum("sha256", "a1" * 32)
    web.pages["/d/SHA256SUMS"] = Page(f"{'b2' * 32}  other\n".encode())
    with pytest.raises(FetchError, match=r"does not list disk\.qcow2"):
        await wanted_checksum(listed)
    del web.pages["/d/SHA256SUMS"]
    with pytest.raises(FetchError, match="404"):
        await wanted_checksum(listed)
