"""Images for system tests, built once and kept between runs.

They lie in ``$CROFT_TEST_CACHE`` (default ``~/.cache/undercroft-test``), each under a key made of
the builder's source and the versions of the packages it would take.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

import undercroft.storage
from undercroft.model.image import ImageContent

Build = Callable[[Path, Path], Coroutine[Any, Any, ImageContent]]


def cache_directory() -> Path:
    """Where built images are kept."""
    given = os.environ.get("CROFT_TEST_CACHE")
    return Path(given) if given else Path.home() / ".cache/undercroft-test"


def content_of(image: Path) -> ImageContent:
    """What the builder said about the image in this directory."""
    return msgspec.json.decode((image.parent / "content.json").read_bytes(), type=ImageContent)


def built(name: str, build: Build, packages: list[str]) -> Path:
    """The directory with the image's files, built now unless it is in the cache."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        place = cache / f"{name}-{_key(name, packages)}"
        if not place.exists():
            _build(build, place)
            _sweep(cache, name, place)
    return place / "files"


def _sweep(cache: Path, name: str, keep: Path) -> None:
    """Removes what was built before yesterday; younger ones may be in use by another run."""
    for old in cache.glob(f"{name}-*"):
        if old != keep and old.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(old)


def _key(name: str, packages: list[str]) -> str:
    digest = hashlib.sha256()
    root = Path(undercroft.storage.__file__).parent
    sources = [root / "process.py", *(root / "build").rglob("*")]
    others = {"tiny", "debian"} - {name.rstrip("0123456789")}
    for path in sorted(path for path in sources if path.is_file() and path.suffix != ".pyc"):
        if any(part.startswith(tuple(others)) for part in path.relative_to(root).parts):
            continue
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    # Answered from the lists that apt has; no network.
    digest.update(
        subprocess.run(["apt-cache", "policy", *packages], capture_output=True, check=True).stdout
    )
    return digest.hexdigest()[:16]


def _build(build: Build, place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent, prefix="building-") as tmp:
        new = Path(tmp, "image")
        work = Path(tmp, "work")
        work.mkdir()
        (new / "files").mkdir(parents=True)
        # In a thread of its own: the test's event loop must not be disturbed.
        with ThreadPoolExecutor(1) as pool:
            content = pool.submit(asyncio.run, build(new / "files", work)).result()
        (new / "content.json").write_bytes(msgspec.json.encode(content))
        new.rename(place)
