"""The data directory."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.errors import (
    DataCorruptError,
    DataError,
    DataLockedError,
    DataNewerError,
    InvalidError,
)
from undercroft.store.datadir import DataDirectory

ROOT = Path(__file__).parents[3]
ID = "vm-0123456789abcdef"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_made_from_nothing(path: Path):
    before = os.umask(0o027)
    try:
        directory = DataDirectory.open(path)
    finally:
        os.umask(before)
    assert json.loads(directory.version_file.read_text()) == {"layout": 1}
    assert path.stat().st_mode & 0o777 == (0o711 if os.geteuid() == 0 else 0o700)
    assert {
        str(entry.relative_to(path)): entry.stat().st_mode & 0o777
        for entry in path.rglob("*")
        if entry.is_dir()
    } == {
        "run": 0o711,
        "run/vms": 0o711,
        "images": 0o711,
        "volumes": 0o711,
        "keys": 0o700,
        "templates": 0o700,
        "exports": 0o700,
        "vms": 0o711,
        "cache": 0o700,
        "tmp": 0o711,
    }
    assert {entry.name for entry in path.iterdir() if entry.is_file()} == {"VERSION"}


def test_opened_again_it_is_the_same(path: Path):
    DataDirectory.open(path)
    (path / "volumes" / "precious").write_text("x")
    before = {entry: entry.stat().st_ino for entry in path.rglob("*")}
    DataDirectory.open(path)
    assert {entry: entry.stat().st_ino for entry in path.rglob("*")} == before


def test_what_is_missing_comes_back(path: Path):
    directory = DataDirectory.open(path)
    directory.tmp.rmdir()
    assert DataDirectory.open(path).tmp.is_dir()


def test_parents_are_made(tmp_path: Path):
    DataDirectory.open(tmp_path / "a" / "b" / "c").check()


def test_naming_it_touches_nothing(path: Path):
    directory = DataDirectory(path)
    assert directory.store_file == path / "store.db"
    assert not path.exists()
    with pytest.raises(DataError, match="no data directory"):
        directory.check()


def test_default_location(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("CROFT_DATA", str(tmp_path / "x"))
    assert DataDirectory().path == tmp_path / "x"


@pytest.mark.parametrize("leftover", [[], ["lost+found"], ["VERSION.half"], ["daemon.log"]])
def test_an_empty_directory_is_taken(path: Path, leftover: list[str]):
    path.mkdir(mode=0o755)
    for name in leftover:
        (path / name).write_text("half of someth")
    DataDirectory.open(path).check()


def test_a_directory_with_something_else_in_it_is_not(path: Path):
    path.mkdir()
    (path / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="not a data directory"):
        DataDirectory.open(path)
    assert [entry.name for entry in path.iterdir()] == ["thesis.tex"]


def test_not_a_directory(path: Path):
    path.write_text("x")
    with pytest.raises(DataError, match="not a directory"):
        DataDirectory.open(path)


def test_below_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError):
        DataDirectory.open(tmp_path / "file" / "data")


def test_a_dangling_link(path: Path):
    path.symlink_to("nowhere")
    with pytest.raises(DataError):
        DataDirectory.open(path)


def test_a_link_to_a_directory(path: Path, tmp_path: Path):
    (tmp_path / "other").mkdir()
    path.symlink_to(tmp_path / "other")
    DataDirectory.open(path)
    assert (tmp_path / "other" / "VERSION").exists()


def test_anybody_could_write(path: Path):
    path.mkdir()
    path.chmod(0o777)
    with pytest.raises(DataError, match="anybody"):
        DataDirectory.open(path)
    assert not list(path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_somebody_elses(path: Path):
    DataDirectory.open(path)
    os.chown(path, 65534, 65534)
    for attempt in (DataDirectory.open, lambda path: DataDirectory(path).check()):
        with pytest.raises(DataError, match="belongs to uid 65534"):
            attempt(path)


def test_newer(path: Path):
    DataDirectory.open(path)
    (path / "VERSION").write_text('{"layout": 7, "more": []}')
    (path / "tmp").rmdir()
    with pytest.raises(DataNewerError) as caught:
        DataDirectory.open(path)
    assert "layout 7" in caught.value.message
    assert "up to 1" in caught.value.message
    assert caught.value.data == {"found": 7, "known": 1}
    assert caught.value.action
    assert not (path / "tmp").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1",
        b"{}",
        b"[]",
        b'{"layout": "1"}',
        b'{"layout": true}',
        b'{"layout": 0}',
        b'{"layout": -1}',
        b'{"layout": 1.0}',
        b"\xff\xfe",
        b"[" * 4000,
        b'{"layout": ' + b"9" * 4000 + b"}",
    ],
)
def test_damaged(path: Path, content: bytes):
    DataDirectory.open(path)
    (path / "VERSION").write_bytes(content)
    with pytest.raises((DataCorruptError, DataNewerError)) as caught:
        DataDirectory.open(path)
    assert caught.value.action
    assert (path / "VERSION").read_bytes() == content


# Names


def test_paths(path: Path):
    directory = DataDirectory(path)
    digest = "0" * 64
    assert directory.vm(ID) == path / "vms" / ID
    assert directory.vm_run(ID) == path / "run" / "vms" / ID
    assert directory.layer("vol-0123456789abcdef") == path / "volumes/vol-0123456789abcdef.qcow2"
    assert directory.image(digest) == path / "images" / digest
    assert directory.cached("probe.json") == path / "cache" / "probe.json"
    assert directory.socket == path / "run" / "api.sock"
    assert directory.log_file == path / "daemon.log"
    assert directory.new_tmp("a") != directory.new_tmp("a")
    assert directory.new_tmp("a").parent == directory.tmp


@given(st.text(max_size=80) | st.sampled_from(["..", ".", "", "a/b", "/", "\x00", ID + "\n"]))
def test_no_name_leads_out(text: str):
    directory = DataDirectory("/data")
    for make in (
        directory.vm,
        directory.vm_run,
        directory.layer,
        directory.image,
        directory.cached,
        directory.new_tmp,
    ):
        try:
            made = make(text)
        except InvalidError:
            continue
        resolved = Path(os.path.normpath(made))
        assert resolved == made
        assert resolved.is_relative_to("/data")
        assert len(resolved.relative_to("/data").parts) in (2, 3)
        assert "\x00" not in str(made)
        assert "\n" not in str(made)


# The lock

HOLD = """
import sys
from undercroft.store.datadir import DataDirectory
directory = DataDirectory.open(sys.argv[1])
directory.lock()
print("locked", flush=True)
sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another daemon, until its input is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)],
        env={"PYTHONPATH": str(ROOT / "src")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


def test_one_daemon_at_a_time(path: Path):
    directory = DataDirectory.open(path)
    with hold(path) as other:
        with pytest.raises(DataLockedError) as caught:
            directory.lock()
        assert caught.value.data == {"pid": other.pid}
        assert str(other.pid) in caught.value.message
        assert caught.value.action
        assert not directory.locked
        other.communicate()
    directory.lock()
    assert directory.locked
    assert directory.lock_file.read_text().strip() == str(os.getpid())
    directory.lock()
    directory.unlock()


def test_the_lock_dies_with_its_holder(path: Path):
    directory = DataDirectory.open(path)
    with hold(path) as other:
        other.kill()
        other.wait()
        directory.lock()
    directory.unlock()


def test_two_objects_in_one_process(path: Path):
    first, second = DataDirectory.open(path), DataDirectory.open(path)
    first.lock()
    with pytest.raises(DataLockedError):
        second.lock()
    first.unlock()
    first.unlock()
    second.lock()
    second.unlock()


def test_what_a_daemon_starts_does_not_hold_the_lock(path: Path):
    """A QEMU outlives its daemon."""
    first = DataDirectory.open(path)
    first.lock()
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        first.unlock()
        second = DataDirectory.open(path)
        second.lock()
        second.unlock()
        child.kill()


def test_a_holder_that_has_not_said_who_it_is(path: Path):
    directory = DataDirectory.open(path)
    with directory.lock_file.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataLockedError) as caught:
            directory.lock()
    assert caught.value.data == {"pid": None}


def test_a_lock_file_that_leads_elsewhere(path: Path, tmp_path: Path):
    directory = DataDirectory.open(path)
    directory.lock_file.symlink_to(tmp_path / "victim")
    with pytest.raises(DataError):
        directory.lock()
    assert not (tmp_path / "victim").exists()


# Sweeping


def test_sweep(path: Path, tmp_path: Path):
    directory = DataDirectory.open(path)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_text("x")
    directory.new_tmp("file").write_text("x")
    deep = directory.new_tmp("deep")
    (deep / "er").mkdir(parents=True)
    (deep / "link").symlink_to(outside)
    directory.new_tmp("link").symlink_to(outside)
    os.mkfifo(directory.new_tmp("fifo"))
    with pytest.raises(DataError):
        directory.sweep()
    directory.lock()
    assert directory.sweep() == 4
    assert list(directory.tmp.iterdir()) == []
    assert (outside / "file").exists()
    assert directory.sweep() == 0
    directory.unlock()
