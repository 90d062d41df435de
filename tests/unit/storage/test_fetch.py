"""Downloads against a web server that misbehaves in every way we could think of."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.storage.webserver import (
    Handler,
    Page,
    Web,
    answer,
    cut_after,
    serving,
    stall_after,
)
from undercroft.model.errors import (
    ChecksumError,
    FetchError,
    HostileImageError,
    InvalidError,
    MissingToolError,
    NoSpaceError,
    TooLargeError,
)
from undercroft.storage import fetch, files
from undercroft.storage.checksums import Checksum
from undercroft.storage.fetch import FetchOptions, fetch_text, fetched, sweep_downloads
from undercroft.storage.http import HttpLimits

BODY = bytes(range(256)) * 16_000  # 4 MB
SUM = Checksum("sha256", hashlib.sha256(BODY).hexdigest())
QUICK = HttpLimits(connect=5.0, answer=5.0)


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


# -- what goes well ---------------------------------------------------------------------------


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


# -- resuming ---------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", [None, SUM], ids=["if-range", "checksum"])
async def test_a_cut_connection_is_resumed(
    web: Web, page: Page, tmp_path: Path, checksum: Checksum | None
) -> None:
    page.script = [cut_after(page, 1_500_000), cut_after(page, 1_000_000)]
    assert await download(web, tmp_path, checksum=checksum) == BODY
    assert ranges(web) == [None, "bytes=1500000-", "bytes=2500000-"]
    conditions = [headers.get("If-Range") for _, headers in web.requests]
    assert conditions == [None, *(['"one"'] * 2 if checksum is None else [None, None])]


async def test_progress_counts_even_where_patience_is_short(
    web: Web, page: Page, tmp_path: Path
) -> None:
    """Every attempt brings a part, so more of them are made than may fail in a row."""
    page.script = [cut_after(page, 1_100_000) for _ in range(3)]
    assert await download(web, tmp_path, attempts=2) == BODY


async def test_a_changed_etag_starts_over(web: Web, page: Page, tmp_path: Path) -> None:
    def change(handler: Handler) -> None:
        page.body, page.etag = BODY[::-1], '"two"'
        handler.serve(page)

    page.script = [cut_after(page, 1_500_000), change]
    assert await download(web, tmp_path) == BODY[::-1]
    assert ranges(web) == [None, "bytes=1500000-"]


async def test_a_date_serves_where_the_etag_is_weak(web: Web, page: Page, tmp_path: Path) -> None:
    page.etag, page.modified = 'W/"one"', "Sun, 01 Mar 2026 10:00:00 GMT"
    page.script = [cut_after(page, 1_500_000)]
    assert await download(web, tmp_path) == BODY
    assert web.requests[1][1]["If-Range"] == page.modified


async def test_without_validator_and_checksum_nothing_is_resumed(
    web: Web, page: Page, tmp_path: Path
) -> None:
    page.etag = None
    page.script = [cut_after(page, 1_500_000)]
    assert await download(web, tmp_path) == BODY
    assert ranges(web) == [None, None]


async def test_a_server_without_ranges(web: Web, page: Page, tmp_path: Path) -> None:
    page.ranges = False
    page.script = [cut_after(page, 1_500_000)]
    assert await download(web, tmp_path, checksum=SUM) == BODY
    assert ranges(web) == [None, "bytes=1500000-"]


async def test_a_range_that_was_not_asked_for(web: Web, page: Page, tmp_path: Path) -> None:
    def shifted(handler: Handler) -> None:
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes 7-{len(BODY) - 1}/{len(BODY)}")
        handler.send_header("Content-Length", str(len(BODY) - 7))
        handler.end_headers()
        handler.wfile.write(BODY[7:])

    page.script = [cut_after(page, 1_500_000), shifted]
    assert await download(web, tmp_path) == BODY
    page.script = [shifted]
    with pytest.raises(FetchError, match="206"):
        await download(web, tmp_path)


async def test_a_file_that_is_shorter_now(web: Web, page: Page, tmp_path: Path) -> None:
    def shrink(handler: Handler) -> None:
        page.body = BODY[:1000]
        handler.serve(page)

    page.script = [cut_after(page, 1_500_000), shrink]
    assert await download(web, tmp_path) == BODY[:1000]


async def test_parts_of_two_versions_are_found_out(web: Web, page: Page, tmp_path: Path) -> None:
    """The file was replaced in between: what is put together is wrong, what is fetched anew not."""
    page.body = bytes(len(BODY))
    page.script = [cut_after(page, 1_500_000)]
    with pytest.raises(FetchError, match="cut after"):
        await download(web, tmp_path, checksum=SUM, attempts=1)
    page.body = BODY
    assert await download(web, tmp_path, checksum=SUM) == BODY
    assert ranges(web) == [None, "bytes=1500000-", None]


async def test_who_gives_up_leaves_a_part_for_the_next(
    web: Web, page: Page, tmp_path: Path
) -> None:
    page.script = [cut_after(page, 1_500_000), *[answer(503)] * 3]
    with pytest.raises(FetchError, match="503"):
        await download(web, tmp_path, attempts=4)
    assert await download(web, tmp_path) == BODY
    assert ranges(web)[-1] == "bytes=1500000-"


async def test_a_complete_file_is_not_fetched_again(web: Web, page: Page, tmp_path: Path) -> None:
    """The daemon was killed, or an import failed for want of a program, after the download."""
    with pytest.raises(MissingToolError):
        await download_in_vain(web, tmp_path, checksum=SUM)
    assert await download(web, tmp_path, checksum=SUM) == BODY
    assert len(web.requests) == 1


async def test_a_complete_file_without_checksum_is_asked_after(
    web: Web, page: Page, tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(MissingToolError):
            await download_in_vain(web, tmp_path)
    assert ranges(web) == [None, f"bytes={len(BODY)}-"]
    page.body, page.etag = b"new" * 1000, '"two"'
    assert await download(web, tmp_path) == b"new" * 1000


async def test_a_refused_image_is_not_kept(web: Web, page: Page, tmp_path: Path) -> None:
    with pytest.raises(HostileImageError):
        async with fetched(web.url("/disk.img"), tmp_path, options()):
            raise HostileImageError("a backing file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"url": 7}', b'{"url": "x", "have": 99}'])
async def test_a_damaged_state_starts_over(
    web: Web, page: Page, tmp_path: Path, garbage: bytes
) -> None:
    page.script = [cut_after(page, 1_500_000)]
    with pytest.raises(FetchError):
        await download(web, tmp_path, attempts=1)
    next(tmp_path.glob("*.json")).write_bytes(garbage)
    assert await download(web, tmp_path) == BODY
    assert ranges(web) == [None, None]


async def test_kill_9_then_resume(web: Web, page: Page, tmp_path: Path) -> None:
    page.script = [stall_after(page, 2_000_000)]
    program = f"""
import asyncio
from pathlib import Path
from undercroft.storage.checksums import Checksum
from undercroft.storage.fetch import FetchOptions, fetched

def told(fraction, phase):
    print(phase, flush=True)

async def main():
    options = FetchOptions(checksum=Checksum.parse("{SUM}"), checkpoint=500_000)
    async with fetched("{web.url("/disk.img")}", Path("{tmp_path}"), options, told):
        pass

asyncio.run(main())
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    with child.stdout as said:
        while b"1.9M of" not in (line := said.readline()):
            assert line, "the child ended by itself"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert await download(web, tmp_path, checksum=SUM) == BODY
    resumed = ranges(web)[1]
    assert resumed is not None
    assert 500_000 <= int(resumed.removeprefix("bytes=").removesuffix("-")) <= 2_000_000


async def test_one_file_wanted_twice_is_fetched_one_after_the_other(
    web: Web, page: Page, tmp_path: Path
) -> None:
    page.script = [stall_after(page, 1_000_000)]
    told: list[str] = []
    first = asyncio.create_task(download(web, tmp_path))
    while not web.requests:
        await asyncio.sleep(0.01)

    async def second() -> bytes:
        url = web.url("/disk.img")
        async with fetched(url, tmp_path, options(), lambda f, p: told.append(p)) as path:
            return path.read_bytes()

    waiting = asyncio.create_task(second())
    while not told:
        await asyncio.sleep(0.01)
    assert told == ["waiting for another download of the same file"]
    assert len(web.requests) == 1
    first.cancel()
    assert await waiting == BODY
    assert ranges(web)[1] == "bytes=1000000-"
    assert list(tmp_path.iterdir()) == []


# -- what must not be taken -------------------------------------------------------------------


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


# -- what does not answer ---------------------------------------------------------------------


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


# -- cancelling -------------------------------------------------------------------------------


async def test_cancelling_wakes_up_and_keeps_the_part(web: Web, page: Page, tmp_path: Path) -> None:
    page.script = [stall_after(page, 1_500_000)]
    limits = HttpLimits(connect=60.0, answer=60.0)
    told: list[str] = []

    async def work() -> None:
        url = web.url("/disk.img")
        async with fetched(url, tmp_path, options(http=limits), lambda f, p: told.append(p)):
            pass

    task = asyncio.create_task(work())
    while "downloading 1.4M of 3.9M" not in told:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await task
    assert await download(web, tmp_path) == BODY
    assert ranges(web) == [None, "bytes=1500000-"]


async def test_cancelling_while_nobody_accepts(tmp_path: Path, web: Web) -> None:
    """A full backlog: connecting hangs."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        crowd = []
        for _ in range(4):
            crowd.append(socket.socket())
            crowd[-1].setblocking(False)
            crowd[-1].connect_ex(address)
        limits = HttpLimits(connect=120.0, answer=120.0)

        async def work() -> None:
            async with fetched(f"http://127.0.0.1:{address[1]}/", tmp_path, options(http=limits)):
                pass

        task = asyncio.create_task(work())
        await asyncio.sleep(0.3)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(20):
                await task
        for one in crowd:
            one.close()


async def test_cancelling_between_attempts(web: Web, page: Page, tmp_path: Path) -> None:
    page.script = [answer(503, Retry_After="60")]
    task = asyncio.create_task(download(web, tmp_path))
    while not web.requests:
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(20):
            await task


# -- proxies ----------------------------------------------------------------------------------


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


# -- small texts, old downloads ---------------------------------------------------------------


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
