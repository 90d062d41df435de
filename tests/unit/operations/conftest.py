"""The world that operations act in."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.operations.world import Services, World
from undercroft.store.sqlite import SQLiteStore


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = await SQLiteStore.open(tmp_path / "store.db")
    yield World(store, Services(tmp_path))
    await store.close()
