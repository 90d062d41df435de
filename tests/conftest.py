"""Marks every test `unit` or `system` by the directory it lives in."""

from pathlib import Path

import pytest
from hypothesis import settings

# A machine may be busy: how long an example takes proves nothing.
settings.register_profile("undercroft", deadline=None)
settings.load_profile("undercroft")

TESTS = Path(__file__).parent
KINDS = ("unit", "system")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--update-golden`` writes the expected outputs anew; look at the difference it makes."""
    parser.addoption("--update-golden", action="store_true", help="rewrite golden test data")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Add the marker named like the first directory below tests/."""
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        kind = item.path.relative_to(TESTS).parts[0]
        if kind in KINDS:
            item.add_marker(kind)
