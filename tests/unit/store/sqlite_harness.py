"""The SQLite store as the contract wants it."""

import shutil
from pathlib import Path

from undercroft.store.interface import Store
from undercroft.store.sqlite import SQLiteStore


class SQLiteHarness:
    """See `tests.unit.store.contract.Harness`. Time passes only when told to."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "store.db"
        self._directory = directory
        self._now = 1000.0

    async def open(self) -> Store:
        return await SQLiteStore.open(self.path, clock=lambda: self._now)

    async def pass_time(self, store: Store, seconds: float) -> None:
        assert isinstance(store, SQLiteStore)
        self._now += seconds
        await store.expire()

    def dispose(self) -> None:
        shutil.rmtree(self._directory)
