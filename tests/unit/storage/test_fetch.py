"""Downloads: what goes well, what must not be taken, proxies, small texts."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

import pytest

from tests.unit.storage.downloading import BODY, SUM, download, options
from tests.unit.storage.webserver import Handler, Page, Web, answer, cut_after, stall_after
from undercroft.model.errors import ChecksumError, FetchError, NoSpaceError, TooLargeError
from undercroft.storage import fetch, files
from undercroft.storage.checksums import Checksum
from undercroft.storage.fetch import fetch_text, fetched, sweep_downloads

# -- what goes well ----------------------------------------------------------------------------


async def test_a_file_is_there_for_the_block_and_gone_afterwards(
    web: Web, page: Page, tmp_path: Path
) -> None:
    told: list[tuple[float, str]] = []
    url = web.url("/disk.img")
    async with fetched(
        url, tmp_path / "d", options(checksum=SUM), lambda f, p: told.append((f, p))
    ) as path:
        assert path.read_bytes() == BODY
    assert list((tmp_path / "d").iterdir()) == []
    assert ("downloading 3.9M of 3.9M") in [phase for _, phase in told]
    assert [f for f, _ in told] == sorted(f for f, _ in told)
    assert told[-1] == (1.0, "checking the download")


async def test_sha512_is_verified_as_well(web: Web, page: Page, tmp_path: Path) -> None:
    good = Checksum("sha512", hashlib.sha512(BODY).hexdigest())
    assert await download(web, tmp_path, checksum=good) == BODY
    with pytest.raises(ChecksumError):
        await download(web, tmp_path, checksum=Checksum("sha512", "0" * 128))


async def test_an_unknown_length_is_fine(web: Web, page: Page, tmp_path: Path) -> None:
    def chunked(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY))

    page.script = [chunked]
    told: list[str] = []
    async with fetched(
        web.url("/disk.img"), tmp_path, options(), lambda f, p: told.append(p)
    ) as path:
        assert path.read_bytes() == BODY
    assert "downloading 3.9M" in told


async def test_redirects_are_followed(web: Web, page: Page, tmp_path: Path) -> None:
    web.pages["/a"] = Page(script=[answer(302, Location="b?x=1")])
    web.pages["/b"] = Page(script=[answer(307, Location=web.url("/disk.img"))])
    async with fetched(web.url("/a"), tmp_path, options()) as path:
        assert path.read_bytes() == BODY
    assert [path for path, _ in web.requests] == ["/a", "/b?x=1", "/disk.img"]


# -- what must not be taken --------------------------------------------------------------------


async def test_a_wrong_checksum_removes_what_has_come(web: Web, page: Page, tmp_path: Path) -> None:
    with pytest.raises(ChecksumError, match="not the file that was announced"):
        await download(web, tmp_path, checksum=Checksum("sha256", "0" * 64))
    assert list(tmp_path.iterdir()) == []
    assert len(web.requests) == 1


async def test_a_body_shorter_than_its_content_length(web: Web, page: Page, tmp_path: Path) -> None:
    """Every answer promises more than it has: an error in the end, never half a file."""
    page.script = [cut_after(page, 1000) for _ in range(8)]
    with pytest.raises(FetchError, match="cut after"):
        await download(web, tmp_path)


async def test_a_body_longer_than_its_content_length(web: Web, page: Page, tmp_path: Path) -> None:
    def lie(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        handler.wfile.write(BODY)

    page.script = [lie]
    with pytest.raises(ChecksumError):
        await download(web, tmp_path, checksum=SUM)


async def test_an_endless_body_ends_at_the_limit(web: Web, page: Page, tmp_path: Path) -> None:
    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        while not handler.server.released.is_set():
            handler.wfile.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")

    page.script = [endless]
    with pytest.raises(TooLargeError, match="larger than 1M"):
        await download(web, tmp_path, max_size=1 << 20)
    assert list(tmp_path.iterdir()) == []


async def test_a_length_beyond_the_limit_is_refused_at_once(
    web: Web, page: Page, tmp_path: Path
) -> None:
    page.script = [stall_after(page, 10)]
    with pytest.raises(TooLargeError):
        await download(web, tmp_path, max_size=1 << 20)


async def test_what_does_not_fit_is_refused_at_once(
    web: Web, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.script = [stall_after(page, 10)]
    monkeypatch.setattr(files, "free_space", lambda path: len(BODY))
    with pytest.raises(NoSpaceError, match=r"downloading disk\.img needs 3\.9M"):
        await download(web, tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_a_disk_that_fills_up(
    web: Web, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes, at: int) -> None:
        if at > 1_000_000:
            raise OSError(28, "No space left on device")
        os.pwrite(fd, data, at)

    monkeypatch.setattr(fetch, "_write", full)
    with pytest.raises(NoSpaceError):
        await download(web, tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- proxies -----------------------------------------------------------------------------------


async def test_a_proxy_is_asked(
    web: Web, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:it%40@127.0.0.1:{web.server_address[1]}")
    async with fetched("http://images.invalid/disk.img", tmp_path, options()) as path:
        assert path.read_bytes() == BODY
    assert web.requests[0][1]["Host"] == "images.invalid"
    assert web.requests[0][1]["Proxy-Authorization"] == "Basic bWU6aXRA"


async def test_no_proxy_for_exceptions(
    web: Web, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.invalid:1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert await download(web, tmp_path) == BODY


async def test_a_proxy_that_makes_no_sense(
    web: Web, page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:1")
    with pytest.raises(FetchError, match="http_proxy"):
        await download(web, tmp_path)


# -- small texts, old downloads ----------------------------------------------------------------


async def test_fetch_text(web: Web) -> None:
    web.pages["/SUMS"] = Page(b"abc  x\n", script=[answer(503), None])
    assert await fetch_text(web.url("/SUMS"), options()) == "abc  x\n"
    web.pages["/SUMS"] = page = Page(b"abc  x\n")
    page.script = [cut_after(page, 3)]
    assert await fetch_text(web.url("/SUMS"), options()) == "abc  x\n"
    web.pages["/SUMS"] = Page(bytes(5 << 20))
    with pytest.raises(TooLargeError):
        await fetch_text(web.url("/SUMS"), options())
    with pytest.raises(FetchError, match="404"):
        await fetch_text(web.url("/nothing"), options())


async def test_sweeping_takes_only_what_is_old_and_idle(
    web: Web, page: Page, tmp_path: Path
) -> None:
    page.script = [cut_after(page, 1_500_000)]
    with pytest.raises(FetchError):
        await download(web, tmp_path, attempts=1)
    kept = sorted(tmp_path.iterdir())
    for name in (f"{kept[0].stem}.unpacked", "other.unpacked"):
        (tmp_path / name).write_bytes(b"left by a crash")
    assert {path.suffix for path in kept} == {".json", ".part"}
    sweep_downloads(tmp_path, time.time() - 3600)
    assert len(list(tmp_path.iterdir())) == len(kept) + 2
    async with fetched(web.url("/disk.img"), tmp_path, options()) as path:
        sweep_downloads(tmp_path, time.time() + 3600)
        assert path.read_bytes() == BODY
    page.script = [cut_after(page, 1_500_000)]
    with pytest.raises(FetchError):
        await download(web, tmp_path, attempts=1)
    sweep_downloads(tmp_path, time.time() + 3600)
    assert list(tmp_path.iterdir()) == []
    sweep_downloads(tmp_path / "not-there", time.time())
