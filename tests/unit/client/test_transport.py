from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from undercroft.client.connect import Endpoint
from undercroft.client.raw import Raw
from undercroft.client.transport import Response, Transport
from undercroft.model.errors import (
    DaemonError,
    InvalidError,
    NotFoundError,
    TimeLimitError,
    UndercroftError,
)

Script = Callable[[socket.socket], None]


class Scripted:
    """A server that answers each connection by the next script."""

    def __init__(self, path: Path, *scripts: Script) -> None:
        self.endpoint = Endpoint(path=str(path))
        self.accepted = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._run, args=(scripts,))
        self._thread.start()

    def _run(self, scripts: tuple[Script, ...]) -> None:
        for script in scripts:
            connection, _ = self._listener.accept()
            self.accepted += 1
            connection.settimeout(10)
            with connection:
                script(connection)

    def close(self) -> None:
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Scripted]]:
    started: list[Scripted] = []

    def start(*scripts: Script) -> Scripted:
        started.append(Scripted(tmp_path / f"s{len(started)}", *scripts))
        return started[-1]

    yield start
    for server in started:
        server.close()


def take(connection: socket.socket) -> bytes:
    """A request's head."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    return data


def saying(*pieces: bytes) -> Script:
    """Takes one request, and sends pieces whatever it was."""

    def script(connection: socket.socket) -> None:
        take(connection)
        with contextlib.suppress(BrokenPipeError):  # the client has heard enough
            for piece in pieces:
                connection.sendall(piece)

    return script


def failing(status: int, body: bytes) -> Script:
    """An answer with a body, whatever it was that was asked."""
    return saying(b"HTTP/1.1 %d No\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))


def get(server: Scripted) -> Response:
    return Transport(server.endpoint, timeout=5).request("GET", "/x")


def test_a_length(scripted: Callable[..., Scripted]) -> None:
    response = get(scripted(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nX: 1\r\n\r\nhello")))
    assert (response.status, response.headers["x"], response.read()) == (200, "1", b"hello")


def test_chunks_with_extension_and_trailer(scripted: Callable[..., Scripted]) -> None:
    server = scripted(
        saying(
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
            b"5;why=not\r\nhel",
            b"lo\r",
            b"\nA\r\n0123456789\r\n0\r\ntrailer: x\r\n\r\n",
        )
    )
    assert get(server).read() == b"hello0123456789"


def test_until_the_end_of_the_connection(scripted: Callable[..., Scripted]) -> None:
    assert (
        get(scripted(saying(b"HTTP/1.0 200 OK\r\n\r\n", b"all ", b"of it"))).read() == b"all of it"
    )


@pytest.mark.parametrize("status", [204, 304])
def test_no_body(scripted: Callable[..., Scripted], status: int) -> None:
    server = scripted(saying(b"HTTP/1.1 %d X\r\ncontent-length: 7\r\n\r\n" % status))
    assert get(server).read() == b""


def test_interim_answers_are_skipped(scripted: Callable[..., Scripted]) -> None:
    server = scripted(
        saying(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    )
    assert get(server).read() == b"ok"


def test_the_connection_is_kept(scripted: Callable[..., Scripted]) -> None:
    def twice(connection: socket.socket) -> None:
        for _ in range(2):
            assert take(connection).startswith(b"GET /x HTTP/1.1\r\nhost: localhost\r\n")
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    server = scripted(twice)
    transport = Transport(server.endpoint)
    assert transport.request("GET", "/x").read() == b"ok"
    assert transport.request("GET", "/x").read() == b"ok"
    assert server.accepted == 1


def test_a_connection_that_the_server_ended_is_replaced(scripted: Callable[..., Scripted]) -> None:
    ok = saying(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    server = scripted(ok, ok)
    transport = Transport(server.endpoint)
    assert transport.request("POST", "/x").read() == b"ok"
    while transport._idle is not None and not transport._idle.stale():
        time.sleep(0.01)
    assert transport.request("POST", "/x").read() == b"ok"
    assert server.accepted == 2


def test_an_answer_that_is_not_read_keeps_its_connection(scripted: Callable[..., Scripted]) -> None:
    ok = saying(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
    server = scripted(ok, ok)
    transport = Transport(server.endpoint)
    first = transport.request("GET", "/x")
    assert transport.request("GET", "/x").read() == b"ok"
    assert first.read() == b"ok"
    transport.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: five\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello too long\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-le",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70000 + b"\r\n\r\n",
    ],
)
def test_a_broken_answer_is_a_clear_error(scripted: Callable[..., Scripted], answer: bytes) -> None:
    server = scripted(saying(answer))
    with pytest.raises(DaemonError):
        get(server).read()


def test_silence_has_a_limit(scripted: Callable[..., Scripted]) -> None:
    ended = threading.Event()

    def script(connection: socket.socket) -> None:
        take(connection)
        ended.wait(5)

    server = scripted(script)
    with pytest.raises(TimeLimitError):
        Transport(server.endpoint).request("GET", "/x", timeout=0.1)
    ended.set()


def test_a_body_in_pieces(scripted: Callable[..., Scripted]) -> None:
    received = bytearray()

    def script(connection: socket.socket) -> None:
        while not received.endswith(b"0\r\n\r\n"):
            received.extend(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    transport = Transport(scripted(script).endpoint)
    assert transport.request("PUT", "/x", body=iter([b"abc", b"", b"defgh"])).status == 200
    assert received.endswith(b"\r\n\r\n3\r\nabc\r\n5\r\ndefgh\r\n0\r\n\r\n")
    assert b"transfer-encoding: chunked" in received


def test_a_refusal_stops_an_upload(scripted: Callable[..., Scripted]) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b"x" * 65536

    problem = b'{"code": "not-found", "detail": "no", "status": 404, "title": "t"}'

    def script(connection: socket.socket) -> None:
        take(connection)
        connection.sendall(
            b"HTTP/1.1 404 No\r\ncontent-length: %d\r\n\r\n%b" % (len(problem), problem)
        )
        while connection.recv(65536):
            pass

    server = scripted(script)
    with pytest.raises(NotFoundError, match="no"):
        Raw(server.endpoint).request("POST", "/x", body=endless())
    assert sent < 1000


def test_a_refusal_that_ends_the_connection_is_still_read(
    scripted: Callable[..., Scripted],
) -> None:
    problem = b'{"code": "invalid", "detail": "too much", "status": 400, "title": "t"}'

    def script(connection: socket.socket) -> None:
        take(connection)
        connection.sendall(
            b"HTTP/1.1 400 No\r\ncontent-length: %d\r\n\r\n%b" % (len(problem), problem)
        )
        connection.shutdown(socket.SHUT_RDWR)

    with pytest.raises(InvalidError, match="too much"):
        Raw(scripted(script).endpoint).request("POST", "/x", body=b"y" * 3_000_000)


def test_what_is_no_problem_document_is_still_an_error(scripted: Callable[..., Scripted]) -> None:
    for body in (b"oops", b"[]", b'{"title": "x"}', b'{"code": 3, "data": 5}'):
        server = scripted(failing(500, body))
        with pytest.raises(UndercroftError):
            Raw(server.endpoint).get("/x")


def test_an_unknown_code_keeps_it(scripted: Callable[..., Scripted]) -> None:
    body = b'{"code": "from-the-future", "status": 499, "title": "t", "detail": "d", "x": 1}'
    server = scripted(failing(499, body))
    with pytest.raises(UndercroftError) as caught:
        Raw(server.endpoint).get("/x")
    assert caught.value.code == "from-the-future"


def test_data_that_looks_like_a_parameter_does_no_harm(scripted: Callable[..., Scripted]) -> None:
    body = (
        b'{"code": "busy", "status": 409, "title": "t", "detail": "d",'
        b' "data": {"message": "x", "self": 1, "object": "y", "limit": 3}}'
    )
    server = scripted(failing(409, body))
    with pytest.raises(UndercroftError) as caught:
        Raw(server.endpoint).get("/x")
    assert (caught.value.message, caught.value.data) == ("d", {"limit": 3})


def test_line_breaks_do_not_get_into_the_head(tmp_path: Path) -> None:
    transport = Transport(Endpoint(path=str(tmp_path / "none")))
    with pytest.raises(InvalidError):
        transport.request("GET", "/x", headers={"a": "b\r\nc: d"})


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=8),
    st.lists(st.integers(1, 200), max_size=12),
)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunks_however_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[bytes], cuts: list[int]
) -> None:
    wire = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    wire += b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    parts, start = [], 0
    for cut in cuts:
        parts.append(wire[start : start + cut])
        start += cut
    server = Scripted(tmp_path_factory.mktemp("cut") / "s", saying(*parts, wire[start:]))
    try:
        assert get(server).read() == b"".join(pieces)
    finally:
        server.close()


@pytest.mark.parametrize(("method", "unsure"), [("POST", True), ("GET", False)])
def test_what_may_have_been_done_is_said_where_the_daemon_dies(
    scripted: Callable[..., Scripted], method: str, unsure: bool
) -> None:
    def die(connection: socket.socket) -> None:
        connection.recv(65536)

    transport = Transport(scripted(die).endpoint)
    with pytest.raises(DaemonError, match="without an answer") as caught:
        transport.request(method, "/v1/vms/web1/exec")
    action = caught.value.action or ""
    assert "croft daemon status" in action
    assert ("may have been carried out" in action) == unsure
    transport.close()
