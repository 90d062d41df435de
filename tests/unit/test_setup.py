"""The parts of script/setup that decide something."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bash(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `script` with the functions of script/setup at hand."""
    libraries = "; ".join(f". {ROOT}/script/lib/{name}.sh" for name in ("system", "python"))
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    return subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {libraries}; PYTHON={sys.executable}; {script}"],
        env=keep | {"PIP_CONFIG_FILE": os.devnull} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("version", "least", "enough"),
    [("10.0.2", "9.0", True), ("7.2.22", "9.0", False), ("9.0", "9.0", True), ("", "7.2", False)],
)
def test_versions_compare_as_numbers(version: str, least: str, enough: bool) -> None:
    assert (bash(f"at_least '{version}' {least}").returncode == 0) is enough


def test_the_version_of_qemu_is_read_from_its_output(tmp_path: Path) -> None:
    fake = tmp_path / "qemu-system-x86_64"
    fake.write_text("#!/bin/sh\necho 'QEMU emulator version 8.2.2 (Debian 1:8.2.2+ds-0ubuntu1)'\n")
    fake.chmod(0o755)
    assert bash(f"PATH={tmp_path}:$PATH; qemu_version").stdout == "8.2.2"


def test_every_row_of_the_needs_is_whole() -> None:
    rows = bash('printf "%s\\n" "$NEEDS"').stdout.splitlines()
    assert len(rows) > 10
    for row in rows:
        level, *_, arch, suse = row.split("|")
        assert level in {"must", "should"}, row
        assert row.count("|") == 6, row
        assert arch, row
        assert suse, row


def uv_settings(**environment: str) -> dict[str, str]:
    result = bash("follow_pip; env", **environment)
    assert result.returncode == 0, result.stderr
    return dict(line.split("=", 1) for line in result.stdout.splitlines() if line.startswith("UV_"))


def test_uv_takes_packages_from_where_pip_does(tmp_path: Path) -> None:
    settings = uv_settings(
        PIP_INDEX_URL="https://mirror.example/simple",
        PIP_EXTRA_INDEX_URL="https://a.example/simple https://b.example/simple",
        PIP_FIND_LINKS=f"{tmp_path} {tmp_path}/absent",
        PIP_TRUSTED_HOST="mirror.example",
    )
    assert settings["UV_DEFAULT_INDEX"] == "https://mirror.example/simple"
    assert settings["UV_INDEX"] == "https://a.example/simple https://b.example/simple"
    assert settings["UV_INDEX_STRATEGY"] == "unsafe-best-match"
    assert settings["UV_FIND_LINKS"] == str(tmp_path)  # uv would stop at one that is absent
    assert settings["UV_INSECURE_HOST"] == "mirror.example"


def test_what_is_set_for_uv_comes_first() -> None:
    settings = uv_settings(
        PIP_INDEX_URL="https://pip.example/simple", UV_DEFAULT_INDEX="https://uv.example/simple"
    )
    assert settings["UV_DEFAULT_INDEX"] == "https://uv.example/simple"


def test_without_configuration_nothing_is_said_about_indexes() -> None:
    assert uv_settings().keys() == {"UV_SYSTEM_CERTS", "UV_PYTHON_DOWNLOADS"}
