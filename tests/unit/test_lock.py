"""Holds the lock: complete, hashed, without addresses, and the same for use and for tests."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("runtime", "dev", "uv")


def text(lock: str) -> str:
    return (ROOT / "requirements" / f"{lock}.txt").read_text()


def normal(name: str) -> str:
    """A package's name as in the lock (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def versions(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9-]+)==(\S+)", text(lock), re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS)
def test_names_no_address(lock: str) -> None:
    assert re.findall(r"^.*(?:://|^\s*-(?!-hash=)).*$", text(lock), re.MULTILINE) == []


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_has_a_hash(lock: str) -> None:
    entries = re.split(r"\n(?=\S)", text(lock).strip())
    packages = [entry for entry in entries if not entry.startswith("#")]
    assert packages
    assert [p.splitlines()[0] for p in packages if not re.search(r"--hash=sha256:\w{64}", p)] == []


def test_what_pyproject_asks_for_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = {
        "runtime": project["project"]["dependencies"],
        "dev": project["dependency-groups"]["dev"],
    }
    for lock, requirements in asked.items():
        names = {normal(re.split(r"[<>=!~\[; ]", each)[0]) for each in requirements}
        assert names - versions(lock).keys() == set()


def test_tests_run_on_what_users_get() -> None:
    runtime, dev = versions("runtime"), versions("dev")
    assert runtime
    assert {name: dev.get(name) for name in runtime} == runtime
