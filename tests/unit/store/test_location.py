"""Where the data directory is."""

import subprocess
import sys
from pathlib import Path

import pytest

from undercroft.store.location import api_socket, data_location

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("given", "environ", "uid", "expected"),
    [
        (None, {"HOME": "/root"}, 0, "/var/lib/undercroft"),
        (None, {"HOME": "/root", "XDG_DATA_HOME": "/x"}, 0, "/var/lib/undercroft"),
        (None, {"HOME": "/home/u"}, 1000, "/home/u/.local/share/undercroft"),
        (None, {"HOME": "/home/u", "XDG_DATA_HOME": "/x"}, 1000, "/x/undercroft"),
        (None, {"HOME": "/home/u", "XDG_DATA_HOME": ""}, 1000, "/home/u/.local/share/undercroft"),
        (None, {"HOME": "/home/u", "XDG_DATA_HOME": "x"}, 1000, "/home/u/.local/share/undercroft"),
        (None, {"HOME": "/home/u", "CROFT_DATA": "/d"}, 1000, "/d"),
        (None, {"HOME": "/root", "CROFT_DATA": "/d"}, 0, "/d"),
        (None, {"HOME": "/home/u", "CROFT_DATA": ""}, 1000, "/home/u/.local/share/undercroft"),
        ("/g", {"CROFT_DATA": "/d"}, 0, "/g"),
        ("/g/../h/", {}, 0, "/h"),
    ],
)
def test_location(given: str | None, environ: dict[str, str], uid: int, expected: str):
    assert data_location(given, environ, uid) == expected


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert data_location("here") == str(tmp_path / "here")
    assert data_location(None, {"CROFT_DATA": "there"}) == str(tmp_path / "there")


def test_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    assert data_location("~/data") == "/home/u/data"


def test_socket():
    assert api_socket("/d") == "/d/run/api.sock"


def test_imports_next_to_nothing():
    code = (
        "import sys; before = set(sys.modules); import undercroft.store.location; "
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=True,
    )
    heavy = {"msgspec", "asyncio", "sqlite3", "pathlib", "json", "undercroft.model.errors"}
    assert not heavy & set(done.stdout.split())
