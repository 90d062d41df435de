"""A place for incarnations of a daemon; whatever they started ends with the test."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import pytest

from undercroft.host import orphans


@pytest.fixture(autouse=True, scope="module")
def no_nursery_is_left(nothing_is_left: None) -> Iterator[None]:
    """What incarnations are forked from would go only with pytest itself."""
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    resource_tracker._resource_tracker._stop()  # type: ignore[attr-defined]


@pytest.fixture
def data() -> Iterator[Path]:
    """A data directory that unprivileged programs can reach into, unlike pytest's own."""
    with tempfile.TemporaryDirectory(prefix="croft-") as path:
        Path(path).chmod(0o711)
        found = Path(path) / "data"
        yield found
        if found.exists():
            orphans.end_processes(found, set(orphans.marked_processes(found)))
