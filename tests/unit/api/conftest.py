from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.api.world import World, running_world
from undercroft.operations import backups


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(backups, "PATIENCE", 0.1)  # there is no agent to wait for
    async with running_world(tmp_path / "data") as world:
        yield world
