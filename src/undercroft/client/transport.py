"""A small HTTP/1.1 exchange over one socket (RFC 9112).

``http.client`` costs 40 ms to import and httpx 200 ms, each more than the rest of ``croft ls``;
what the API needs is this much. One connection is kept alive; a response that is still being read
keeps its connection to itself, and the next request opens another.
"""

from __future__ import annotations

from undercroft.client.connection import CHUNK, MAX_HEAD, MAX_LINE, Connection, Gone, broken

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from typing import Self

    from undercroft.client.connect import Endpoint

TIMEOUT = 60.0  # seconds without a byte
_SAFE_TO_REPEAT = ("GET", "HEAD")
_UNSURE = (
    "it may have been carried out: look before you repeat it; see whether the daemon still runs "
    "(croft daemon status), and its log"
)


class Response:
    """An answer whose body has not been read yet. ``headers`` have lower-case names."""

    __slots__ = ("_connection", "_length", "_reusable", "_transport", "headers", "status")

    def __init__(
        self,
        transport: Transport,
        connection: Connection,
        method: str,
        head: list[bytes],
        reusable: bool = True,
    ) -> None:
        self._transport = transport
        self._reusable = reusable
        self._connection: Connection | None = connection
        self.status, self.headers = _parse_head(connection.where, head)
        # Bytes still to come; -1: chunked; -2: until the connection ends (RFC 9112, section 6.3).
        self._length = -2
        if method == "HEAD" or self.status in (204, 304) or self.status < 200:
            self._length = 0
        elif "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._length = -1
        elif (length := self.headers.get("content-length")) is not None:
            if not length.isdigit():
                raise broken(connection.where, "a length that is no number")
            self._length = int(length)
        if self._length == 0:
            self._finish()

    def read(self) -> bytes:
        """The (rest of the) body."""
        return b"".join(self.chunks())

    def chunks(self) -> Iterator[bytes]:
        """The body, piece by piece, as it arrives.

        Raises:
            DaemonError: the connection ended too early.
            TimeLimitError: nothing arrived in time.
        """
        connection = self._connection
        if connection is None:
            return
        done = False
        try:
            if self._length == -1:
                yield from self._chunked(connection)
            elif self._length == -2:
                while data := connection.receive():
                    yield data
            else:
                while self._length:
                    data = connection.receive(min(self._length, CHUNK))
                    if not data:
                        raise broken(
                            connection.where, "the connection ended in the middle of an answer"
                        )
                    self._length -= len(data)
                    yield data
            done = True
        finally:
            if done:
                self._finish()
            else:
                self.close()

    def _chunked(self, connection: Connection) -> Iterator[bytes]:
        while True:
            text = connection.line(256).split(b";")[0].strip()
            try:
                size = int(text, 16)
            except ValueError:
                raise broken(connection.where, "a chunk without size") from None
            if size <= 0:
                break
            while size:
                data = connection.receive(min(size, CHUNK))
                if not data:
                    raise broken(
                        connection.where, "the connection ended in the middle of an answer"
                    )
                size -= len(data)
                yield data
            if connection.line(16):
                raise broken(connection.where, "a chunk longer than announced")
        while connection.line(MAX_HEAD):
            pass  # trailers

    def lines(self) -> Iterator[bytes]:
        """The body line by line, without their ends (for event streams)."""
        rest = b""
        for data in self.chunks():
            pieces = (rest + data).split(b"\n")
            rest = pieces.pop()
            if len(rest) > 16 * MAX_LINE:
                raise broken(self._transport.where, "a line without end")
            for piece in pieces:
                yield piece[:-1] if piece.endswith(b"\r") else piece

    def _finish(self) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        closing = self._length == -2 or "close" in self.headers.get("connection", "").lower()
        if self._reusable and not closing:
            self._transport.put_back(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Gives up on the rest of the body."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Transport:
    """Sends requests to one endpoint. Not for use by several threads at once."""

    def __init__(self, endpoint: Endpoint, timeout: float = TIMEOUT) -> None:
        self.endpoint = endpoint
        self.timeout = timeout
        self.where = str(endpoint)
        self._idle: Connection | None = None

    def request(
        self,
        method: str,
        target: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | Iterable[bytes] | None = None,
        timeout: float | None = None,
    ) -> Response:
        """Sends a request and returns the answer, whatever its status, once its head is there.

        ``body`` as an iterable is sent chunk by chunk. ``timeout`` (seconds without a byte)
        defaults to that of the transport.

        Raises:
            DaemonError: nobody answers, or what answers is no daemon.
            TimeLimitError: no answer in time.
            ForbiddenError, UnauthenticatedError: see `open_socket`.
        """
        head = self._head(method, target, headers, body)
        while True:
            connection = self._take()
            connection.set_timeout(self.timeout if timeout is None else timeout)
            try:
                return self._exchange(connection, method, head, body)
            except Gone:
                connection.close()
                if not connection.used or method not in _SAFE_TO_REPEAT:
                    what = "the connection ended without an answer"
                    if method in _SAFE_TO_REPEAT:
                        raise broken(self.where, what) from None
                    raise broken(self.where, what, _UNSURE) from None
            except BaseException:
                connection.close()
                raise

    def _exchange(
        self, connection: Connection, method: str, head: bytes, body: bytes | Iterable[bytes] | None
    ) -> Response:
        whole = self._send(connection, head + body if isinstance(body, bytes) else head)
        if whole and body is not None and not isinstance(body, bytes):
            whole = self._send_chunks(connection, body)
        lines = connection.head()
        while lines[0].startswith((b"HTTP/1.1 1", b"HTTP/1.0 1")) and b" 101" not in lines[0][:13]:
            lines = connection.head()  # interim, such as 100 Continue
        return Response(self, connection, method, lines, reusable=whole)

    def _send_chunks(self, connection: Connection, body: Iterable[bytes]) -> bool:
        """Sends a body of unknown length; False if it was refused before its end."""
        for chunk in body:
            if connection.answered():
                return False
            if chunk and not self._send(connection, b"%x\r\n%b\r\n" % (len(chunk), chunk)):
                return False
        return self._send(connection, b"0\r\n\r\n")

    def _send(self, connection: Connection, data: bytes) -> bool:
        """Sends; False if the connection ended. The reason may have been sent, so read on."""
        try:
            connection.send(data)
        except TimeoutError:
            from undercroft.model.errors import TimeLimitError

            raise TimeLimitError(f"the daemon at {self.where} does not take the request") from None
        except OSError:
            return False
        return True

    def _head(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str] | None,
        body: bytes | Iterable[bytes] | None,
    ) -> bytes:
        lines = [f"{method} {target} HTTP/1.1", f"host: {self.endpoint.authority}"]
        if self.endpoint.token is not None:
            lines.append(f"authorization: Bearer {self.endpoint.token}")
        if isinstance(body, bytes):
            lines.append(f"content-length: {len(body)}")
        elif body is not None:
            lines.append("transfer-encoding: chunked")
        elif method not in ("GET", "HEAD"):
            lines.append("content-length: 0")
        for name, value in (headers or {}).items():
            lines.append(f"{name}: {value}")
        if any("\n" in line or "\r" in line or "\0" in line for line in lines):
            from undercroft.model.errors import InvalidError

            raise InvalidError("a line break does not belong into a request's head")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8")

    def connect(self) -> Connection:
        """A connection of its own, for another protocol."""
        return Connection(self.endpoint)

    def _take(self) -> Connection:
        connection, self._idle = self._idle, None
        if connection is not None:
            if not connection.stale():
                connection.used = True
                return connection
            connection.close()
        return Connection(self.endpoint)

    def put_back(self, connection: Connection) -> None:
        """Keeps a connection for the next request."""
        if self._idle is not None:
            self._idle.close()
        self._idle = connection

    def close(self) -> None:
        """Ends the idle connection."""
        if self._idle is not None:
            self._idle.close()
            self._idle = None


def _parse_head(where: str, lines: list[bytes]) -> tuple[int, dict[str, str]]:
    first = lines[0].split(b" ", 2)
    if len(first) < 2 or not first[0].startswith(b"HTTP/1.") or not first[1].isdigit():
        raise broken(where, "that is not HTTP")
    headers: dict[str, str] = {}
    for line in lines[1:]:
        name, colon, value = line.partition(b":")
        if not colon:
            raise broken(where, "a header without a name")
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    return int(first[1]), headers
