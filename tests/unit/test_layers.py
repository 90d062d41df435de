"""Holds the architecture: who may import whom, and how long a file may be."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SRC = Path(__file__).parents[2] / "src"
ROOT = "undercroft"

# A package imports from its own floor and from those below.
FLOORS = {
    "model": 1,
    "resources": 2,
    "store": 2,
    "hypervisor": 2,
    "storage": 2,
    "network": 2,
    "client": 2,
    "operations": 3,
    "host": 3,
    "cluster": 3,
    "api": 4,
    "vsphere": 4,
    "cli": 5,
    "simulation": 5,
}

# Stricter than the floors: all that these may import of ours, besides themselves.
ONLY = {
    "model": set[str](),
    "resources": {"model"},
    "store": {"model"},
    "hypervisor": {"model"},
    "client": {"model"},
}

# The model states what exists. It does nothing, and does not know what time it is.
NOT_IN_MODEL = {"asyncio", "socket", "sqlite3", "subprocess", "threading", "time"}

LONGEST = 500  # lines; about 400 is the aim


def sources(src: Path) -> list[Path]:
    """Every Python file of the package below `src`."""
    return sorted((src / ROOT).rglob("*.py"))


def imports(src: Path, file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything `file` imports, wherever in the file it does so.

    `from a import b` gives `a.b`: whether b is a module does not matter for the package.
    """
    here = file.relative_to(src).with_suffix("").parts
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = list(here[: len(here) - node.level]) if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def package_of(file: Path, src: Path) -> str | None:
    """The package a file belongs to; None for the modules right below the root."""
    parts = file.relative_to(src / ROOT).parts
    return parts[0] if len(parts) > 1 else None


def violations(src: Path) -> list[str]:
    """Every import that the architecture forbids, as `file:line: reason`."""
    found: list[str] = []
    for file in sources(src):
        own = package_of(file, src)
        if own is None:
            continue
        where = file.relative_to(src)
        if own not in FLOORS:
            found.append(f"{where}:1: package {own} has no floor")
            continue
        for line, name in imports(src, file):
            parts = name.split(".")
            if own == "model" and parts[0] in NOT_IN_MODEL:
                found.append(f"{where}:{line}: model must not import {parts[0]}")
            if parts[0] != ROOT or len(parts) < 2:
                continue
            other = parts[1]
            if other == own or other not in FLOORS:
                continue
            if FLOORS[other] > FLOORS[own]:
                found.append(f"{where}:{line}: {own} is below {other}")
            elif own in ONLY and other not in ONLY[own]:
                found.append(f"{where}:{line}: {own} must not import {other}")
    return found


def too_long(src: Path, limit: int = LONGEST) -> list[str]:
    """Every file longer than `limit` lines."""
    lengths = ((file, len(file.read_text().splitlines())) for file in sources(src))
    return [f"{file.relative_to(src)}: {n} lines" for file, n in lengths if n > limit]


def test_floors() -> None:
    assert sources(SRC), "found no source"
    assert violations(SRC) == []


def test_no_file_does_everything() -> None:
    assert too_long(SRC) == []


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("model/vm.py", "import undercroft.store", "model is below store"),
        ("model/vm.py", "def f():\n    from time import time", "model must not import time"),
        ("hypervisor/q.py", "from undercroft import storage", "hypervisor must not import storage"),
        ("client/http.py", "from ..store import sqlite", "client must not import store"),
        ("store/sqlite/db.py", "from ...api import app", "store is below api"),
        ("attic/junk.py", "", "package attic has no floor"),
    ],
)
def test_a_forbidden_import_is_found(tmp_path: Path, file: str, text: str, reason: str) -> None:
    path = tmp_path / ROOT / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (found,) = violations(tmp_path)
    assert found.endswith(reason)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("api/app.py", "from undercroft.operations import vms\nimport undercroft"),
        ("operations/vms.py", "from . import images\nfrom undercroft.store import interface"),
        ("cli/main.py", "from undercroft import __version__, client"),
        ("__main__.py", "from undercroft.cli.main import main"),
    ],
)
def test_an_allowed_import_is_not(tmp_path: Path, file: str, text: str) -> None:
    path = tmp_path / ROOT / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == []


def test_a_long_file_is_found(tmp_path: Path) -> None:
    (tmp_path / ROOT).mkdir()
    (tmp_path / ROOT / "long.py").write_text("x = 1\n" * 3)
    assert too_long(tmp_path, limit=3) == []
    assert too_long(tmp_path, limit=2) == ["undercroft/long.py: 3 lines"]
