"""What system tests share: images that really boot."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.built_images import built
from undercroft.storage.build.debian import build_debian
from undercroft.storage.build.tiny import build_tiny

PATIENCE = 20.0  # seconds in which what was killed must be gone


def children() -> dict[int, str]:
    """Processes that this one has started, and whose end it has not taken note of."""
    found = {}
    for path in Path("/proc/self/task").glob("*/children"):
        for word in path.read_text().split():
            try:
                status = Path(f"/proc/{word}/stat").read_text()
            except OSError:
                continue
            found[int(word)] = status.partition("(")[2].rpartition(")")[0]
    return found


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left() -> Iterator[None]:
    """Whoever leaves a process behind is told, rather than a later test that counts them."""
    before = children()
    yield
    deadline = time.monotonic() + PATIENCE
    while left := {pid: name for pid, name in children().items() if pid not in before}:
        assert time.monotonic() < deadline, f"these tests leave processes behind: {left}"
        time.sleep(0.1)


@pytest.fixture(scope="session")
def tiny_image_dir() -> Path:
    """A directory with the files of `tiny`: ``kernel`` and ``initrd``.

    ``tests.system.built_images.content_of`` tells what the builder said about it.
    """
    return built(
        "tiny", build_tiny, ["linux-image-cloud-amd64", "busybox-static", "qemu-guest-agent"]
    )


@pytest.fixture(scope="session")
def debian_image_dir() -> Path:
    """A directory with the files of ``debian:12``: ``disk.qcow2``, ``kernel`` and ``initrd``."""
    return built("debian12", build_debian, ["linux-image-amd64", "systemd", "cloud-init"])
