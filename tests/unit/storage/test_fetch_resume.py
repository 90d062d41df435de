"""Downloads that are cut, cancelled or killed, and go on."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.storage.downloading import BODY, SUM, download, download_in_vain, options, ranges
from tests.unit.storage.webserver import Handler, Page, Web, answer, cut_after, stall_after
from undercroft.model.errors import FetchError, HostileImageError, MissingToolError
from undercroft.storage.checksums import Checksum
from undercroft.storage.fetch import fetched
from undercroft.storage.http import HttpLimits

# -- resuming ----------------------------------------------------------------------------------


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


# -- cancelling --------------------------------------------------------------------------------


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
