"""A disk that is really full, and then is not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def namespace() -> list[str]:
    """The command that makes a mount namespace, as root or as an ordinary user."""
    return (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    )


def test_full_disk(tmp_path: Path):
    if subprocess.run([*namespace(), "true"], capture_output=True).returncode != 0:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run(
        [*namespace(), sys.executable, "-m", "tests.system.store.full_disk_child", tmp_path],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "passed\n", done.stderr
