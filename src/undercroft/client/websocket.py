"""A WebSocket (RFC 6455) that fits a ``select`` loop: ``websockets``' protocol, no threads."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Self

from undercroft.client.raw import problem_error, target
from undercroft.client.transport import Transport
from undercroft.model.errors import DaemonError, TimeLimitError

if TYPE_CHECKING:
    from websockets.client import ClientProtocol
    from websockets.protocol import Event

    from undercroft.client.connection import Connection

_CONNECT = 30.0  # seconds until the handshake must be through
_CLOSE = 2.0  # seconds for the other side to say goodbye
MAX_MESSAGE = 4 << 20
_SLICE = 64 << 10


class WebSocket:
    """An open two-way stream of bytes.

    ``close_code`` and ``close_reason`` tell how it ended (RFC 6455, section 7.4), once it has.
    """

    def __init__(self, connection: Connection, protocol: ClientProtocol) -> None:
        self._connection = connection
        self._socket, _ = connection.detach()
        self._protocol = protocol
        self._messages: deque[bytes] = deque()
        self._partial = bytearray()
        self._ended = False

    def fileno(self) -> int:
        """For ``select``. Call `receive` with timeout 0 until it returns b"" when it is readable:
        with TLS, more may have been read than the kernel still holds."""
        return self._socket.fileno()

    def receive(self, timeout: float | None = None) -> bytes | None:
        """The next message; b"" if none came within ``timeout`` seconds; None at the end."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._messages:
            if self._ended:
                return None
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left < 0:
                left = 0.0
            if not self._pump(left):
                return b""
        return self._messages.popleft()

    def send(self, data: bytes) -> None:
        """Sends bytes; waits while the other side does not take them.

        Raises:
            DaemonError: the connection has ended.
        """
        if self._ended:
            raise self._gone()
        for start in range(0, len(data), _SLICE):
            self._protocol.send_binary(data[start : start + _SLICE])
        self._flush()

    def close(self) -> None:
        """Says goodbye, and waits briefly for the answer."""
        if not self._ended:
            with contextlib.suppress(Exception):
                self._protocol.send_close(1000)
                self._flush()
                self._wait_for_end(time.monotonic() + _CLOSE)
        self._ended = True
        self._connection.close()

    @property
    def close_code(self) -> int | None:
        """Why it ended, as a number."""
        if not self._ended:
            return None
        received = self._protocol.close_rcvd
        return 1006 if received is None else int(received.code)

    @property
    def close_reason(self) -> str:
        """Why it ended, in words."""
        received = self._protocol.close_rcvd
        return "" if received is None else received.reason

    def __iter__(self) -> Iterator[bytes]:
        while (data := self.receive()) is not None:
            yield data

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for_end(self, deadline: float) -> None:
        while not self._ended and (left := deadline - time.monotonic()) > 0:
            self._pump(left)

    def _gone(self) -> DaemonError:
        reason = self.close_reason or "the connection has ended"
        return DaemonError(f"the console is closed: {reason}")

    def _pump(self, timeout: float | None) -> bool:
        """Reads once; False if nothing came in time."""
        try:
            # A timeout of 0 would make the socket non-blocking, with errors of its own.
            self._socket.settimeout(None if timeout is None else max(timeout, 0.0001))
            data = self._socket.recv(65536)
        except TimeoutError:
            return False
        except OSError:
            data = b""
        if data:
            self._protocol.receive_data(data)
        else:
            self._protocol.receive_eof()
            self._ended = True
        self.take(self._protocol.events_received())
        with contextlib.suppress(DaemonError):
            self._flush()
        return True

    def take(self, events: list[Event]) -> None:
        """Takes in what the protocol made of the bytes that were received."""
        from websockets.frames import Frame, Opcode

        for event in events:
            if not isinstance(event, Frame):
                continue
            if event.opcode in (Opcode.BINARY, Opcode.TEXT, Opcode.CONT):
                self._partial += event.data
                if event.fin:
                    if self._partial:
                        self._messages.append(bytes(self._partial))
                    self._partial.clear()
            elif event.opcode is Opcode.CLOSE:
                self._ended = True

    def _flush(self) -> None:
        try:
            self._socket.settimeout(60.0)
            for data in self._protocol.data_to_send():
                if data:
                    self._socket.sendall(data)
        except OSError:
            self._ended = True
            raise self._gone() from None


def open_websocket(
    transport: Transport, path: str, params: Mapping[str, object], subprotocol: str | None = None
) -> WebSocket:
    """Opens a WebSocket beside the transport's own connection.

    Raises:
        UndercroftError: what the server refused it with.
        DaemonError: nobody answers.
    """
    from websockets.client import ClientProtocol
    from websockets.http11 import Response
    from websockets.typing import Subprotocol
    from websockets.uri import parse_uri

    endpoint = transport.endpoint
    uri = parse_uri(f"ws://{endpoint.authority}{target(path, params)}")
    protocol = ClientProtocol(
        uri,
        subprotocols=None if subprotocol is None else [Subprotocol(subprotocol)],
        max_size=MAX_MESSAGE,
    )
    request = protocol.connect()
    if endpoint.token is not None:
        request.headers["Authorization"] = f"Bearer {endpoint.token}"
    connection = transport.connect()
    try:
        connection.set_timeout(_CONNECT)
        protocol.send_request(request)
        for data in protocol.data_to_send():
            connection.send(data)
        socket = WebSocket(connection, protocol)
        while True:
            data = connection.receive()
            if data:
                protocol.receive_data(data)
            else:
                protocol.receive_eof()
            received = protocol.events_received()
            if received or not data:
                break
        if not received or not isinstance(received[0], Response):
            raise DaemonError(f"the daemon at {endpoint} did not open the console")
        answer = received[0]
        if answer.status_code != 101:
            raise problem_error(str(endpoint), answer.status_code, bytes(answer.body or b""))
        if protocol.handshake_exc is not None:
            raise DaemonError(f"the daemon at {endpoint}: {protocol.handshake_exc}")
        socket.take(received[1:])
        return socket
    except TimeoutError:
        connection.close()
        raise TimeLimitError(f"the daemon at {endpoint} does not react") from None
    except OSError as error:
        connection.close()
        raise DaemonError(f"the daemon at {endpoint} ended the connection ({error})") from None
    except BaseException:
        connection.close()
        raise
