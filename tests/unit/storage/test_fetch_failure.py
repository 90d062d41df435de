"""Downloads from servers that do not answer, or not well."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.unit.storage.downloading import BODY, download, options, ranges
from tests.unit.storage.webserver import Handler, Page, Web, answer, stall_after
from undercroft.model.errors import FetchError, InvalidError
from undercroft.storage.fetch import fetched
from undercroft.storage.http import HttpLimits


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 501])
async def test_a_refusal_is_final(web: Web, page: Page, tmp_path: Path, status: int) -> None:
    page.script = [answer(status)]
    with pytest.raises(FetchError, match=f"answers {status}"):
        await download(web, tmp_path)
    assert len(web.requests) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_a_passing_failure_is_tried_again(
    web: Web, page: Page, tmp_path: Path, status: int
) -> None:
    page.script = [answer(status, Retry_After="0"), answer(status)]
    assert await download(web, tmp_path) == BODY
    assert len(web.requests) == 3


async def test_a_lasting_failure_is_told(web: Web, page: Page, tmp_path: Path) -> None:
    page.script = [answer(500) for _ in range(9)]
    with pytest.raises(FetchError, match="answers 500"):
        await download(web, tmp_path)
    assert len(web.requests) == 4


async def test_a_stall_is_noticed(web: Web, page: Page, tmp_path: Path) -> None:
    page.script = [stall_after(page, 1_500_000)]
    limits = HttpLimits(connect=5.0, answer=0.3)
    assert await download(web, tmp_path, http=limits) == BODY
    assert ranges(web) == [None, "bytes=1500000-"]


async def test_a_trickle_is_as_good_as_a_stall(web: Web, page: Page, tmp_path: Path) -> None:
    def trickle(handler: Handler) -> None:
        handler.serve(page, limit=1_500_000)
        while not handler.server.released.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    page.script = [trickle]
    limits = HttpLimits(connect=5.0, answer=0.5)
    data = await download(web, tmp_path, http=limits)
    # What trickled in is kept, for it may have been right; only a checksum could tell.
    assert len(data) == len(BODY)
    resumed = ranges(web)[1]
    assert resumed is not None
    assert resumed >= "bytes=1500000-"


async def test_a_head_that_trickles(web: Web, page: Page, tmp_path: Path) -> None:
    def trickle(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not handler.server.released.wait(0.02):
            handler.wfile.write(b"x")
            handler.wfile.flush()

    page.script = [trickle]
    limits = HttpLimits(connect=5.0, answer=0.5)
    assert await download(web, tmp_path, http=limits) == BODY


async def test_a_head_that_is_cut_off(web: Web, page: Page, tmp_path: Path) -> None:
    """Not a whole head without a length, with nothing behind it."""

    def cut(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nServer: x\r\n")

    page.script = [cut]
    assert await download(web, tmp_path) == BODY


async def test_what_is_no_http(web: Web, page: Page, tmp_path: Path) -> None:
    def greet(handler: Handler) -> None:
        handler.wfile.write(b"SSH-2.0-x\r\n")

    page.script = [greet] * 4
    with pytest.raises(FetchError, match="gives no answer"):
        await download(web, tmp_path)


async def test_nobody_there(tmp_path: Path, web: Web) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        with pytest.raises(FetchError, match="Connection refused"):
            async with fetched(url, tmp_path, options(attempts=2)):
                pass


async def test_redirects_in_circles(web: Web, tmp_path: Path) -> None:
    web.pages["/a"] = Page(script=[answer(302, Location="/b") for _ in range(99)])
    web.pages["/b"] = Page(script=[answer(302, Location="/a") for _ in range(99)])
    with pytest.raises(FetchError, match="circles"):
        async with fetched(web.url("/a"), tmp_path, options()):
            pass
    assert len(web.requests) == 2


async def test_redirects_without_end(web: Web, tmp_path: Path) -> None:
    for number in range(30):
        web.pages[f"/{number}"] = Page(script=[answer(302, Location=f"/{number + 1}")])
    with pytest.raises(FetchError, match="too often"):
        async with fetched(web.url("/0"), tmp_path, options()):
            pass
    assert len(web.requests) == HttpLimits().redirects + 1


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://u:p@h/x"])
async def test_redirects_to_elsewhere(web: Web, tmp_path: Path, target: str) -> None:
    web.pages["/a"] = Page(script=[answer(302, Location=target)])
    with pytest.raises(FetchError, match="redirects to where nothing is fetched from"):
        async with fetched(web.url("/a"), tmp_path, options()):
            pass


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd",
        "ftp://example.org/x",
        "http:///x",
        "http://user:secret@example.org/x",
        "http://example.org:99999/x",
        "http://example.org/a b",
        "http://[::1/x",
        "example.org/x",
        "",
    ],
)
async def test_what_is_no_address(tmp_path: Path, url: str) -> None:
    with pytest.raises(InvalidError) as caught:
        async with fetched(url, tmp_path, options()):
            pass
    assert "secret" not in caught.value.message
