"""Images fetched by a whole daemon, from a web server on the loopback."""

from __future__ import annotations

import hashlib
import lzma
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.daemon.installation import Installation, until
from tests.unit.storage.webserver import Page, Web, cut_after, serving, stall_after
from undercroft.model.errors import DataError, NotFoundError
from undercroft.model.image import Image, ImageSourceKind
from undercroft.model.requests import ImageCreate
from undercroft.model.task import TaskState

SIZE = 48 << 20


@pytest.fixture
def web() -> Iterator[Web]:
    with serving() as server:
        yield server


@pytest.fixture
def running(empty: Installation) -> Installation:
    empty.environ = {"no_proxy": "*"}
    empty.start()
    return empty


@pytest.fixture(scope="module")
def raw() -> bytes:
    return b"boot" + os.urandom(3 << 20) + bytes(SIZE - (3 << 20) - 4)


@pytest.fixture(scope="module")
def qcow2(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    directory = tmp_path_factory.mktemp("images")
    source, target = directory / "disk.raw", directory / "disk.qcow2"
    source.write_bytes(raw)
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*convert, str(source), str(target)], check=True)
    return target.read_bytes()


def publish(web: Web, installation: Installation, body: bytes, name: str = "disk.qcow2") -> Page:
    """Puts the image on the server, with a list of checksums, and into the user's catalogue."""
    web.pages[f"/{name}"] = page = Page(body)
    sums = f"{'0' * 128}  other\n{hashlib.sha512(body).hexdigest()}  {name}\n"
    web.pages["/SHA512SUMS"] = Page(sums.encode())
    (installation.data / "catalogue.toml").write_text(
        f'["mine:1"]\ntitle = "Mine"\nos = "mine 1"\nurl = "{web.url("/" + name)}"\n'
        f'checksum = "{web.url("/SHA512SUMS")}"\nuser = "me"\nmemory = "1G"\nfirmware = "uefi"\n'
    )
    return page


def content_of_disk(installation: Installation, image: Image, tmp_path: Path) -> bytes:
    out = tmp_path / "back.raw"
    disk = installation.data / "images" / str(image.status.digest) / "disk.qcow2"
    convert = ["qemu-img", "convert", "-f", "qcow2", "-O", "raw"]
    subprocess.run([*convert, str(disk), str(out)], check=True)
    return out.read_bytes()


def downloads(installation: Installation) -> list[Path]:
    directory = installation.data / "cache" / "downloads"
    return sorted(directory.iterdir()) if directory.exists() else []


CATALOGUE = ImageCreate(source=ImageSourceKind.CATALOGUE, value="mine:1")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "xz"])
def test_from_the_catalogue(
    running: Installation, web: Web, raw: bytes, qcow2: bytes, tmp_path: Path, packed: bool
) -> None:
    name, body = ("disk.qcow2.xz", lzma.compress(qcow2)) if packed else ("disk.qcow2", qcow2)
    page = publish(web, running, body, name)
    page.script = [cut_after(page, 2_000_000)]
    known = {entry["name"]: entry for entry in running.client.images.catalogue()}
    assert known["mine:1"]["title"] == "Mine"
    assert "ubuntu:24.04" in known
    task = running.finish(running.client.images.create(CATALOGUE))
    image = running.client.images.get("mine:1")
    assert task.status.result["digest"] == image.status.digest
    content = image.status.content
    assert content is not None
    assert (content.os, content.defaults.user, content.defaults.memory) == ("mine 1", "me", 1 << 30)
    assert content.defaults.firmware == "uefi"
    assert content_of_disk(running, image, tmp_path) == raw
    assert downloads(running) == []
    fetched = [headers.get("Range") for path, headers in web.requests if path == f"/{name}"]
    assert fetched == [None, "bytes=2000000-"]
    running.assert_in_order()


def test_what_is_said_beside_the_name_counts(running: Installation, web: Web, qcow2: bytes) -> None:
    publish(web, running, qcow2)
    request = ImageCreate(
        source=ImageSourceKind.CATALOGUE, value="mine:1", name="other", user="you", firmware="bios"
    )
    running.finish(running.client.images.create(request))
    content = running.client.images.get("other").status.content
    assert content is not None
    assert (content.defaults.user, content.defaults.firmware) == ("you", "bios")


def test_killed_while_downloading(
    running: Installation, web: Web, raw: bytes, qcow2: bytes, tmp_path: Path
) -> None:
    """What has come is not fetched again by the next daemon, which carries the task on."""
    page = publish(web, running, qcow2)
    page.script = [cut_after(page, 1_500_000), stall_after(page, 1_000_000)]
    task = running.client.images.create(CATALOGUE)

    def phase() -> bool:
        # The second part is under way, so that the first has been made durable.
        return "downloading 2.4M of" in running.client.tasks.get(task.meta.id).status.phase

    until(phase, "the second part stalls")
    running.kill()
    running.start()
    running.finish(task)
    image = running.client.images.get("mine:1")
    assert content_of_disk(running, image, tmp_path) == raw
    ranges = [headers.get("Range") for path, headers in web.requests if path == "/disk.qcow2"]
    assert ranges == [None, "bytes=1500000-", "bytes=1500000-"]
    assert downloads(running) == []
    running.assert_in_order()


def test_cancelled_while_downloading(running: Installation, web: Web, qcow2: bytes) -> None:
    """The image is gone at once; what has come waits for another try."""
    page = publish(web, running, qcow2)
    page.script = [stall_after(page, 1_500_000)]
    task = running.client.images.create(CATALOGUE)
    until(
        lambda: "downloading 1.4M of" in running.client.tasks.get(task.meta.id).status.phase,
        "it stalls",
    )
    running.client.tasks.cancel(task.meta.id)
    running.finish(task, TaskState.CANCELLED)
    assert running.client.images.list() == []
    assert [path.suffix for path in downloads(running)] == [".json", ".part"]
    running.finish(running.client.images.create(CATALOGUE))
    assert web.requests[-1][1]["Range"] == "bytes=1500000-"
    assert downloads(running) == []


def test_a_wrong_checksum(running: Installation, web: Web, qcow2: bytes) -> None:
    web.pages["/disk.qcow2"] = Page(qcow2)
    request = ImageCreate(source=ImageSourceKind.URL, value=web.url("/disk.qcow2"), sha256="0" * 64)
    task = running.finish(running.client.images.create(request), TaskState.FAILED)
    assert task.status.error is not None
    assert task.status.error.code == "checksum"
    assert running.client.images.list() == []
    assert downloads(running) == []
    right = hashlib.sha256(qcow2).hexdigest()
    again = ImageCreate(source=ImageSourceKind.URL, value=web.url("/disk.qcow2"), sha256=right)
    running.finish(running.client.images.create(again))
    assert [image.meta.name for image in running.client.images.list()] == ["disk"]


@pytest.mark.parametrize(
    ("name", "body", "code"),
    [
        ("disk.qcow2", b"QFI\xfb\0\0\0\3" + bytes(100), "image-refused"),
        ("disk.qcow2.xz", b"this is not xz", "image-refused"),
        ("disk.qcow2.gz", b"", "image-refused"),
        ("page.html", b"<html>moved</html>", "invalid"),
    ],
)
def test_what_is_no_image(
    running: Installation, web: Web, name: str, body: bytes, code: str
) -> None:
    web.pages[f"/{name}"] = Page(body)
    request = ImageCreate(source=ImageSourceKind.URL, value=web.url(f"/{name}"), name="bad")
    task = running.finish(running.client.images.create(request), TaskState.FAILED)
    assert task.status.error is not None
    assert task.status.error.code == code
    assert downloads(running) == []
    assert list((running.data / "tmp").iterdir()) == []
    running.assert_in_order()


def test_names_that_nobody_knows(running: Installation, web: Web, qcow2: bytes) -> None:
    publish(web, running, qcow2)
    request = ImageCreate(source=ImageSourceKind.CATALOGUE, value="mine:2")
    with pytest.raises(NotFoundError) as caught:
        running.client.images.create(request)
    assert "mine:1" in str(caught.value.action)
    (running.data / "catalogue.toml").write_text('["mine:1"]\nurl = 7\n')
    with pytest.raises(DataError, match=r"catalogue\.toml.*mine:1.*line 1"):
        running.client.images.create(CATALOGUE)
    with pytest.raises(DataError, match=r"catalogue\.toml"):
        running.client.images.catalogue()
    assert running.client.images.list() == []
