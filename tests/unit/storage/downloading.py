"""What tests of downloads share: a file, and ways to ask for it."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tests.unit.storage.webserver import Web
from undercroft.model.errors import MissingToolError
from undercroft.storage.checksums import Checksum
from undercroft.storage.fetch import FetchOptions, fetched
from undercroft.storage.http import HttpLimits

BODY = bytes(range(256)) * 16_000  # 4 MB
SUM = Checksum("sha256", hashlib.sha256(BODY).hexdigest())
QUICK = HttpLimits(connect=5.0, answer=5.0)


def options(**values: object) -> FetchOptions:
    given = {"backoff": 0.01, "http": QUICK, "attempts": 4, **values}
    return FetchOptions(**given)  # type: ignore[arg-type]


async def download(web: Web, directory: Path, **values: object) -> bytes:
    async with fetched(web.url("/disk.img"), directory, options(**values)) as path:
        return path.read_bytes()


async def download_in_vain(web: Web, directory: Path, **values: object) -> None:
    async with fetched(web.url("/disk.img"), directory, options(**values)) as path:
        assert path.read_bytes() == web.pages["/disk.img"].body
        raise MissingToolError("no qemu-img")


def ranges(web: Web) -> list[str | None]:
    return [headers.get("Range") for _, headers in web.requests]
