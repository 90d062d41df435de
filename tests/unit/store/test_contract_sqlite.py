"""Holds the SQLite store to the contract."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.unit.store.contract import ConcurrencyContract, StoreContract
from tests.unit.store.contract_lease import LeaseContract
from tests.unit.store.contract_machine import StoreMachine
from tests.unit.store.contract_watch import WatchContract
from tests.unit.store.sqlite_harness import SQLiteHarness


@pytest.fixture
def harness(tmp_path: Path) -> SQLiteHarness:
    return SQLiteHarness(tmp_path)


class TestSQLite(StoreContract):
    pass


class TestSQLiteConcurrency(ConcurrencyContract):
    pass


class TestSQLiteWatch(WatchContract):
    pass


class TestSQLiteLease(LeaseContract):
    pass


class SQLiteMachine(StoreMachine):
    def make_harness(self) -> SQLiteHarness:
        # In memory where possible: thousands of fsyncs would tell nothing more here.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        return SQLiteHarness(Path(tempfile.mkdtemp(prefix="undercroft-store-", dir=memory)))


TestSQLiteMachine = SQLiteMachine.TestCase
TestSQLiteMachine.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
