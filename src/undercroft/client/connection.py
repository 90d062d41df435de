"""One connection to a daemon: a socket, and what was received but not yet taken."""

from __future__ import annotations

import select
import socket

from undercroft.client.connect import Endpoint, open_socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from undercroft.model.errors import UndercroftError

MAX_HEAD = 64 << 10
MAX_LINE = 1 << 20
CHUNK = 64 << 10


class Gone(Exception):
    """The connection ended, or broke, before the response began."""


class Connection:
    """A socket and what was received but not yet taken."""

    __slots__ = ("_buffer", "_socket", "used", "where")

    def __init__(self, endpoint: Endpoint) -> None:
        self._socket = open_socket(endpoint)
        self._buffer = bytearray()
        self.where = str(endpoint)
        self.used = False

    def set_timeout(self, seconds: float | None) -> None:
        """How long a single read or write may take; None: for ever."""
        self._socket.settimeout(seconds)

    def stale(self) -> bool:
        """Whether the server has ended this idle connection (or sent what nobody asked for)."""
        poll = select.poll()
        poll.register(self._socket.fileno(), select.POLLIN | select.POLLRDHUP)
        return bool(poll.poll(0))

    def answered(self) -> bool:
        """Whether an answer has begun to arrive, though the request is not wholly sent."""
        if not self._buffer and self.stale():
            timeout = self._socket.gettimeout()
            self._socket.settimeout(0)
            try:
                data = self._socket.recv(CHUNK)
            except OSError:  # nothing yet: with TLS also what carries no data makes it readable
                return False
            finally:
                self._socket.settimeout(timeout)
            self._buffer += data
            return True
        return bool(self._buffer)

    def send(self, data: bytes | bytearray | memoryview) -> None:
        """Sends all of it. Raises OSError."""
        self._socket.sendall(data)

    def receive(self, size: int = CHUNK) -> bytes:
        """Up to ``size`` bytes, empty at the end of the stream. Raises as the API's client does."""
        if self._buffer:
            data = bytes(self._buffer[:size])
            del self._buffer[:size]
            return data
        return self._fill(size)

    def line(self, limit: int = MAX_LINE) -> bytes:
        """One line without its end. Empty also stands for an empty line."""
        start = 0
        while (end := self._buffer.find(b"\n", start)) < 0:
            start = len(self._buffer)
            if start > limit:
                raise broken(self.where, "a line without end")
            data = self._fill()
            if not data:
                raise broken(self.where, "the connection ended in the middle of an answer")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line[:-1] if line.endswith(b"\r") else line

    def head(self) -> list[bytes]:
        """The lines of a response's head.

        Raises:
            Gone: the connection ended before the first byte.
        """
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise broken(self.where, "a head without end")
            data = self._fill()
            if not data:
                if self._buffer:
                    raise broken(self.where, "the connection ended in the middle of an answer")
                raise Gone
            self._buffer += data
        if end > MAX_HEAD:
            raise broken(self.where, "a head without end")
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        del self._buffer[: end + 4]
        return lines

    def _fill(self, size: int = CHUNK) -> bytes:
        try:
            return self._socket.recv(size)
        except TimeoutError:
            from undercroft.model.errors import TimeLimitError

            raise TimeLimitError(
                f"the daemon at {self.where} does not react",
                action="see its log (daemon.log in its data directory)",
            ) from None
        except OSError:
            return b""  # whoever reads knows whether that is too early

    def detach(self) -> tuple[socket.socket, bytes]:
        """The socket, and what was received already, for another protocol."""
        return self._socket, bytes(self._buffer)

    def close(self) -> None:
        """Ends it."""
        self._socket.close()


_LOOK = "see whether it still runs (croft daemon status), and its log"


def broken(where: str, what: str, action: str = _LOOK) -> UndercroftError:
    """The error for an answer that cannot be used."""
    from undercroft.model.errors import DaemonError

    return DaemonError(
        f"the answer of the daemon at {where} is broken: {what}",
        action=action,
    )
