"""A web server for downloads, and a file on it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.storage.downloading import BODY
from tests.unit.storage.webserver import Page, Web, serving


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as server:
        yield server


@pytest.fixture
def page(web: Web) -> Page:
    web.pages["/disk.img"] = page = Page(BODY)
    return page
