"""A place for incarnations of a daemon; whatever they started ends with the test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from undercroft.host import orphans


@pytest.fixture
def data() -> Iterator[Path]:
    """A data directory that unprivileged programs can reach into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="croft-") as path:
        Path(path).chmod(0o711)
        found = Path(path) / "data"
        yield found
        if found.exists():
            orphans.end_processes(found, set(orphans.marked_processes(found)))
