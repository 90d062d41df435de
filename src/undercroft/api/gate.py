"""Before the application: who asks, how long it took, and that every failure is a problem."""

from __future__ import annotations

import grp
import os
import pwd
import time
from functools import lru_cache
from typing import Any

import structlog
from litestar.types import ASGIApp, Message, Receive, Send

from undercroft.api.consoles import deny
from undercroft.api.peers import Peer
from undercroft.api.problems import MEDIA_TYPE, problem_body, to_problem
from undercroft.api.statistics import Statistics
from undercroft.api.tokens import TokenFile
from undercroft.model.errors import (
    ForbiddenError,
    NotFoundError,
    UnauthenticatedError,
)
from undercroft.operations.access import ALL, Caller

GROUP = "undercroft"
OPEN = ("/healthz",)
_STREAMS = ("/v1/events/stream", "/v1/watch")
_EVERYTHING = frozenset({ALL})
_log = structlog.get_logger(__name__)


def group_id() -> int | None:
    """The id of the group whose members may use the daemon; None if there is no such group."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


class Identification:
    """Finds out who asks: by the kernel's word on a unix socket, by a token over TCP."""

    def __init__(self, tokens: TokenFile, own_uid: int | None = None) -> None:
        self._tokens = tokens
        self._own_uid = os.geteuid() if own_uid is None else own_uid

    def __call__(self, scope: Any) -> Caller:
        """The caller of a request.

        Raises:
            ForbiddenError: a local user who may not use this daemon.
            UnauthenticatedError: no token, or none that is valid.
        """
        peer: Peer | None = scope["state"].get("peer")
        if peer is not None:
            return self._local(peer)
        return self._remote(scope["headers"])

    def _local(self, peer: Peer) -> Caller:
        if peer.uid not in (0, self._own_uid):
            group = group_id()
            if group is None or group not in (peer.gid, *peer.groups):
                raise ForbiddenError(
                    f"{user_name(peer.uid)} may not use this daemon",
                    action=f"become root or a member of the group '{GROUP}', or use your own "
                    "daemon (--data, CROFT_DATA)",
                )
        return Caller(user_name(peer.uid), _EVERYTHING)

    def _remote(self, headers: list[tuple[bytes, bytes]]) -> Caller:
        found = [value for name, value in headers if name == b"authorization"]
        if len(found) == 1 and found[0][:7].lower() == b"bearer ":
            caller = self._tokens.caller(found[0][7:].strip())
            if caller is not None:
                return caller
            raise UnauthenticatedError(
                "the token is not valid", action="make one with: croft token create NAME"
            )
        raise UnauthenticatedError(
            "a token is needed here",
            action="make one where the daemon runs with: croft token create NAME; "
            "give it as CROFT_TOKEN",
        )


@lru_cache(maxsize=256)
def user_name(uid: int) -> str:
    """What to call a local user."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


class Gate:
    """The outermost ASGI application."""

    def __init__(self, app: ASGIApp, identify: Identification, statistics: Statistics) -> None:
        self._app = app
        self._identify = identify
        self._statistics = statistics

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._websocket(scope, receive, send)

    async def _http(self, scope: Any, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        status = 0

        async def observe(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        streams = scope["path"] in _STREAMS
        self._statistics.open_streams += streams
        try:
            if scope["path"] not in OPEN:
                scope["state"]["caller"] = self._identify(scope)
            await self._app(scope, receive, observe)
        except Exception as error:
            problem, headers = to_problem(_cause(error), f"{scope['method']} {scope['path'][:200]}")
            if status:
                raise  # in the middle of a body: the server ends the connection
            await _respond(observe, problem_body(problem), problem.status, headers)
        finally:
            self._statistics.open_streams -= streams
            seconds = time.perf_counter() - began
            route = scope.get("path_template") or "none"
            self._statistics.count(scope["method"], route, status, None if streams else seconds)
            _log.debug(
                "request",
                method=scope["method"],
                path=scope["path"],
                status=status,
                milliseconds=round(seconds * 1000, 2),
            )

    async def _websocket(self, scope: Any, receive: Receive, send: Send) -> None:
        status = 0

        async def observe(message: Any) -> None:
            nonlocal status
            kind = message["type"]
            if kind == "websocket.close" and not status:
                # Litestar closes what it has no route for; ours answer for themselves.
                error = NotFoundError("there is no such WebSocket", object=scope["path"][:200])
                status = error.status
                await deny(send, *to_problem(error, scope["path"]))
                return
            if kind == "websocket.accept":
                status = 101
            elif kind == "websocket.http.response.start":
                status = message["status"]
            await send(message)

        self._statistics.open_streams += 1
        try:
            try:
                scope["state"]["caller"] = self._identify(scope)
            except (ForbiddenError, UnauthenticatedError) as error:
                await receive()
                await deny(observe, *to_problem(error, scope["path"]))
                return
            await self._app(scope, receive, observe)
        finally:
            self._statistics.open_streams -= 1
            self._statistics.count("WEBSOCKET", scope.get("path_template") or "none", status, None)


def _cause(error: Exception) -> Exception:
    cause = error.__cause__
    return cause if isinstance(cause, Exception) else error


async def _respond(send: Send, body: bytes, status: int, headers: dict[str, str]) -> None:
    fields = {**headers, "content-type": MEDIA_TYPE, "content-length": str(len(body))}
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "http.response.body", "body": body, "more_body": False})
