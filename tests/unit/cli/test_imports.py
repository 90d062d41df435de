"""Files on their way to the daemon, and what is said of what became of them."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.cli.conftest import Outcome
from tests.unit.cli.fake_api import Call, FakeApi, problem, task, vm
from undercroft.cli import sending
from undercroft.cli.bundle import bundle
from undercroft.cli.sending import Files, Pipe
from undercroft.model.errors import HostileImageError

Croft = Callable[..., Outcome]


class Uploads:
    """Takes what is sent. ``mishaps``: how many requests break off after half of their bytes."""

    def __init__(self, api: FakeApi) -> None:
        self.api = api
        self.content = bytearray()
        self.mishaps = 0
        self.requests = 0
        self.key = ""
        api.routes[("POST", "/v1/imports")] = self.created
        api.routes[("GET", "/v1/tasks/task-1")] = task(
            verb="vm.create", result={"notes": ["a floppy drive is left out"]}
        )
        api.routes[("GET", "/v1/vms/vm-web1")] = vm("web1", "stopped")
        answer = api.answer

        def routed(call: Call) -> Any:
            if call.path.startswith("/v1/uploads/"):
                self.key = call.path.rpartition("/")[2]
                api.routes[(call.method, call.path)] = self.taken
            return answer(call)

        api.answer = routed  # type: ignore[method-assign]

    def taken(self, call: Call) -> Any:
        if call.method == "PUT":
            self.requests += 1
            if int(call.query["offset"]) != len(self.content):
                return problem(409, "wrong-state", "not there", data={"size": len(self.content)})
            if self.mishaps:
                self.mishaps -= 1
                self.content += call.body[: len(call.body) // 2]
                return problem(503, "daemon", "it is restarted")
            self.content += call.body
        elif call.method == "DELETE":
            self.content.clear()
        return {"key": self.key, "size": len(self.content)}

    def created(self, call: Call) -> Any:
        body = call.json
        if "path" in body:  # it sees other files than we do
            return problem(404, "not-found", "there is no such file", object=body["path"])
        assert body["upload"] == self.key
        assert body["sha256"] == hashlib.sha256(self.content).hexdigest()
        return 202, task(verb="vm.create", state="running")


@pytest.fixture
def uploads(api: FakeApi) -> Uploads:
    return Uploads(api)


@pytest.fixture
def ova(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sending, "PIECE", 100_000)
    path = tmp_path / "web1.ova"
    path.write_bytes(os.urandom(1_234_567))
    return path


def test_a_file_is_found_or_else_sent(croft: Croft, uploads: Uploads, ova: Path) -> None:
    outcome = croft("import", str(ova), "web1", "--network", "none", "--memory", "2G")
    assert outcome.code == 0, outcome.err
    assert bytes(uploads.content) == ova.read_bytes()
    assert "web1 was imported, and is stopped" in outcome.out
    assert "note: a floppy drive is left out" in outcome.err
    first, second = uploads.api.sent("POST", "/v1/imports")
    status = ova.stat()
    about = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    assert (first.json["path"], first.json["stamp"]) == (str(ova), about)
    assert second.json["networks"] == {"*": "none"}
    assert second.json["memory"] == 2 << 30


def test_it_goes_on_where_it_was_cut_off(croft: Croft, uploads: Uploads, ova: Path) -> None:
    uploads.mishaps = 3
    assert croft("import", str(ova), "web1").code == 0
    assert bytes(uploads.content) == ova.read_bytes()
    # The same from a call that was killed.
    uploads.content = uploads.content[:700_000]
    uploads.requests = 0
    outcome = croft("import", str(ova), "web1")
    assert outcome.code == 0
    assert bytes(uploads.content) == ova.read_bytes()
    assert uploads.requests == 6
    # What is larger than the file cannot be of it.
    uploads.content += b"x"
    assert croft("import", str(ova), "web1").code == 0
    assert bytes(uploads.content) == ova.read_bytes()


def test_a_refusal_is_told(croft: Croft, uploads: Uploads, ova: Path) -> None:
    refusal = problem(400, "image-refused", "the package is refused: it lies", action="leave it")
    uploads.api.routes[("POST", "/v1/imports")] = refusal
    outcome = croft("import", str(ova), "web1")
    assert outcome.code == 1
    assert "it lies (image-refused)" in outcome.err
    assert uploads.requests == 0  # nor is it sent elsewhere


@pytest.mark.parametrize(
    "words",
    [
        ("web1.ova", "a", "--name", "b"),
        ("web1.ova", "--network", "bridge"),
        ("nowhere.ova",),
        (".",),
    ],
)
def test_called_wrongly(croft: Croft, uploads: Uploads, ova: Path, words: tuple[str, ...]) -> None:
    outcome = croft("import", str(ova.parent / words[0]), *words[1:])
    assert outcome.code != 0
    assert outcome.err
    assert not uploads.api.sent("POST", "/v1/imports")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    parts=st.lists(st.tuples(st.binary(max_size=20), st.none() | st.binary(max_size=60))),
    cuts=st.lists(st.integers(1, 30)),
)
def test_files_in_a_row_read_as_one(
    parts: list[tuple[bytes, bytes | None]], cuts: list[int], tmp_path: Path
) -> None:
    opened: list[tuple[bytes, int | None]] = []
    for index, (head, content) in enumerate(parts):
        path = tmp_path / f"{index}"
        path.write_bytes(content or b"")
        opened.append((head, None if content is None else os.open(path, os.O_RDONLY)))
    files = Files(opened)
    whole = b"".join(head + (content or b"") for head, content in parts)
    assert files.size == len(whole)
    at = 0
    for cut in [*cuts, len(whole) + 1]:
        piece = files.read(at, cut)
        assert piece == whole[at : at + cut]
        at += len(piece)
    for _, descriptor in opened:
        if descriptor is not None:
            os.close(descriptor)


def test_the_last_piece_of_a_pipe_can_be_sent_again() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"abcdefgh")
    os.close(writing)
    pipe = Pipe(reading)
    assert pipe.read(0, 4) == b"abcd"
    assert pipe.read(2, 4) == b"cd"
    assert pipe.read(4, 100) == b"efgh"
    assert pipe.read(8, 100) == b""
    os.close(reading)


def test_files_that_lie_beside_each_other_become_an_archive(tmp_path: Path) -> None:
    long = f"{'ä' * 60}-disk.vmdk"
    files = {"My VM.ovf": b"", "My VM.mf": b"sums", "disk 1.vmdk": b"x" * 700, long: b"y"}
    references = f'<File href="disk%201.vmdk"/><File href="{long}"/>'
    spaces = 'xmlns="http://schemas.dmtf.org/ovf/envelope/1"'
    text = f"<Envelope {spaces}><References>{references}</References></Envelope>"
    files["My VM.ovf"] = text.encode()
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "other.txt").write_text("not of it")
    found = bundle(str(tmp_path / "My VM.ovf"))
    assert found.size is not None
    data = found.read(0, found.size)
    assert len(data) == found.size
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        there = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
    assert there == files


@pytest.mark.parametrize("href", ["../secret", "/etc/passwd", "file:///etc/passwd", "..%2fsecret"])
def test_a_descriptor_does_not_make_us_send_what_lies_elsewhere(href: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    directory = tmp_path / "there"
    directory.mkdir()
    path = directory / "it.ovf"
    path.write_text(f'<Envelope><References><File href="{href}"/></References></Envelope>')
    with pytest.raises(HostileImageError):
        bundle(str(path))
    (directory / "disk.vmdk").symlink_to("../secret")
    path.write_text('<Envelope><References><File href="disk.vmdk"/></References></Envelope>')
    with pytest.raises(Exception, match=r"disk\.vmdk, which cannot be read"):
        bundle(str(path))
