"""A fake daemon, and croft called in this process."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.unit.cli.fake_api import FakeApi
from undercroft.cli.main import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A data directory with a path short enough for a socket in it."""
    with tempfile.TemporaryDirectory(prefix="croft-") as directory:
        for name in ("CROFT_URL", "CROFT_DEBUG", "NO_COLOR", "FORCE_COLOR"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("CROFT_DATA", directory)
        monkeypatch.setenv("HOME", str(tmp_path))
        for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_DATA_HOME"):
            monkeypatch.delenv(name, raising=False)
        yield Path(directory)


@pytest.fixture
def api(data: Path) -> Iterator[FakeApi]:
    fake = FakeApi(data / "run" / "api.sock")
    yield fake
    fake.close()


@pytest.fixture
def croft(data: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Calls croft with the given words."""

    def call(*words: str) -> Outcome:
        capfd.readouterr()
        code = main(list(words))
        return Outcome(code, *capfd.readouterr())

    return call
