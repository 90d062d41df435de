"""Who is on the other end of a connection, and a protocol that bounds what they may do before
anything is known of them."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import struct
import time
from email.utils import formatdate
from typing import Any, NamedTuple, cast

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from undercroft.api.problems import MEDIA_TYPE, problem_body
from undercroft.model.errors import InvalidError, TooLargeError, UndercroftError

MAX_HEAD = 64 << 10  # bytes of a request's line and headers together
HEAD_TIME = 30.0  # seconds until they must have arrived
MAX_REMOTE = 512  # connections over TCP at a time
_SO_PEERGROUPS = 59  # Linux 4.13, include/uapi/asm-generic/socket.h
_MAX_OPTION = 1024  # bytes that Python lets an option have: 256 groups


class Peer(NamedTuple):
    """The process that connected to a unix socket, as the kernel saw it then (unix(7))."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...]


def peer_of(connection: socket.socket) -> Peer:
    """Who is on the other end of a unix socket. Raises OSError."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, uid, gid = struct.unpack("3i", data)
    uid, gid = uid & 0xFFFFFFFF, gid & 0xFFFFFFFF
    try:
        raw = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION)
        groups = struct.unpack(f"{len(raw) // 4}I", raw)
    except OSError:  # more groups than fit, or a kernel that is too old
        groups = _groups_of(uid, gid)
    return Peer(pid, uid, gid, groups)


def _groups_of(uid: int, gid: int) -> tuple[int, ...]:
    """The groups that a user has by the user database, rather than those of the process."""
    try:
        return tuple(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))
    except (KeyError, OSError):
        return (gid,)


class ApiState(ServerState):
    """What the connections of one server share."""

    def __init__(self) -> None:
        super().__init__()
        self._second = 0
        self.remote = 0

    def refresh(self) -> None:
        """Keeps the Date header right, without a timer that wakes an idle daemon."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self.default_headers = [(b"date", formatdate(now, usegmt=True).encode())]


class ApiProtocol(HttpToolsProtocol):
    """HTTP/1.1 by uvicorn, with the peer's credentials in ``scope["state"]["peer"]``, and limits on
    the size and the duration of a request's head, which httptools does not have."""

    server_state: ApiState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head = 0
        self._in_head = True
        self._deadline: asyncio.TimerHandle | None = None
        self._remote = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection; also one over TLS, once that is established."""
        transport = cast(asyncio.Transport, transport)  # uvloop's are none by their class
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection.family == socket.AF_UNIX:
            try:
                # The state goes into the scope of every request, and on to a WebSocket's.
                self.app_state = {**self.app_state, "peer": peer_of(connection)}
            except OSError:
                transport.abort()  # gone already
                return
        else:
            self._remote = True
            self.server_state.remote += 1
            if self.server_state.remote > MAX_REMOTE:
                transport.abort()
                return
        self._begin_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end of it."""
        self._end_head()
        if self._remote:
            self._remote = False
            self.server_state.remote -= 1
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Counts what comes before a request is complete enough to be judged."""
        if self._in_head:
            self._head += len(data)
            if self._head > MAX_HEAD + len(data):  # this piece may hold body already
                self._refuse(TooLargeError("the head of the request is larger than 64K"), 431)
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Parser: a request begins."""
        self.server_state.refresh()
        if self._deadline is None:
            self._begin_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Parser: a header."""
        super().on_header(name, value)
        if len(self.headers) > 256:
            raise httptools.HttpParserError("too many headers")

    def on_headers_complete(self) -> None:
        """Parser: the head is there."""
        self._end_head()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Parser: the body is there, too."""
        super().on_message_complete()
        self._head = 0
        self._in_head = True

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP."""
        self._refuse(InvalidError(f"{msg.rstrip('.')}: that is not HTTP/1.1"), 400)

    def _begin_head(self) -> None:
        self._head = 0
        self._in_head = True
        self._deadline = self.loop.call_later(HEAD_TIME, self._too_slow)

    def _end_head(self) -> None:
        self._in_head = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()

    def _refuse(self, error: UndercroftError, status: int) -> None:
        body = problem_body(error.problem())
        self.transport.write(
            b"HTTP/1.1 %d Refused\r\ncontent-type: %b\r\ncontent-length: %d\r\n"
            b"connection: close\r\n\r\n%b" % (status, MEDIA_TYPE.encode(), len(body), body)
        )
        self.transport.close()
