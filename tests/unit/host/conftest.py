"""A host without QEMU."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.unit.host.rig import Rig, rigged


@pytest.fixture
async def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    async with rigged(tmp_path, monkeypatch) as made:
        yield made
