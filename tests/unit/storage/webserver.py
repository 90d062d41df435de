"""A small web server on the loopback, which can be told how to misbehave."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """What is at a path. ``script`` gets the handler in place of the usual answer while its next
    element is not None; each request takes one."""

    body: bytes = b""
    etag: str | None = '"one"'
    modified: str | None = None
    ranges: bool = True
    script: list[Callable[[Handler], None] | None] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    """Serves `Web.pages`, with ranges."""

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        path = self.path.removeprefix(f"http://{self.headers.get('Host')}")
        self.server.requests.append((path, dict(self.headers.items())))
        self.close_connection = True
        page = self.server.pages.get(path.partition("?")[0])
        with contextlib.suppress(ConnectionError):
            if page is None:
                self.send_error(404)
            elif page.script and (step := page.script.pop(0)) is not None:
                step(self)
            else:
                self.serve(page)

    def serve(self, page: Page, *, limit: int | None = None) -> None:
        """The usual answer; cut off after ``limit`` bytes of its body."""
        start = 0
        wanted = self.headers.get("Range")
        same = self.headers.get("If-Range") in (None, page.etag, page.modified)
        if wanted and page.ranges and same:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(page.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(page.body)}")
                self.end_headers()
                return
            self.send_response(206)
            end = len(page.body) - 1
            self.send_header("Content-Range", f"bytes {start}-{end}/{len(page.body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(page.body) - start))
        if page.etag:
            self.send_header("ETag", page.etag)
        if page.modified:
            self.send_header("Last-Modified", page.modified)
        self.end_headers()
        body = page.body[start:]
        self.wfile.write(body if limit is None else body[:limit])

    def log_message(self, format: str, *args: object) -> None:
        pass


class Web(ThreadingHTTPServer):
    """The server: its pages by path, and what it was asked for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, Page] = {}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.released = threading.Event()  # set at the end: no handler waits longer

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextlib.contextmanager
def serving() -> Iterator[Web]:
    """Runs a server for the length of the block."""
    web = Web()
    thread = threading.Thread(target=web.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield web
    finally:
        web.released.set()
        web.shutdown()
        thread.join()
        web.server_close()


def answer(status: int, **headers: str) -> Callable[[Handler], None]:
    """A step that answers with a status and no body."""

    def step(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return step


def cut_after(page: Page, size: int) -> Callable[[Handler], None]:
    """A step that breaks the connection after so many bytes of the body."""
    return lambda handler: handler.serve(page, limit=size)


def stall_after(page: Page, size: int) -> Callable[[Handler], None]:
    """A step that falls silent after so many bytes of the body."""

    def step(handler: Handler) -> None:
        handler.serve(page, limit=size)
        handler.wfile.flush()
        handler.server.released.wait(60)

    return step
