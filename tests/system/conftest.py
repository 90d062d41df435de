"""What system tests share: images that really boot."""

from pathlib import Path

import pytest

from tests.system.built_images import built
from undercroft.storage.build.debian import build_debian
from undercroft.storage.build.tiny import build_tiny


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
