"""The most frequent request, showing one object, answered without the framework.

The framework costs 120 µs of the 180 µs that such a request takes behind uvicorn (bench/api.py,
docs/decisions). What is answered here is still described, and would be answered the same, by the
controllers; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from litestar.types import ASGIApp, Receive, Send

from undercroft.api.answers import etag
from undercroft.operations.access import Caller
from undercroft.operations.core import Operations
from undercroft.store.interface import Versioned

Read = Callable[[Caller, str], Awaitable[Versioned[Any]]]


class HotReads:
    """Answers ``GET /v1/KIND/REF`` without a query; passes everything else on."""

    def __init__(self, app: ASGIApp, operations: Operations) -> None:
        self._app = app
        self._reads: dict[str, Read] = {
            "vms": operations.vms.get,
            "images": operations.images.get,
            "volumes": operations.volumes.get,
            "tasks": operations.tasks.get,
            "hosts": operations.hosts.get,
        }
        self._encode = msgspec.json.Encoder().encode

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http" and scope["method"] == "GET" and not scope["query_string"]:
            parts = scope["path"].split("/")
            if len(parts) == 4 and parts[1] == "v1" and parts[3] and parts[2] in self._reads:
                await self._answer(scope, send, parts[2], parts[3])
                return
        await self._app(scope, receive, send)

    async def _answer(self, scope: Any, send: Send, kind: str, ref: str) -> None:
        scope["path_template"] = f"/v1/{kind}/{{{'id' if kind == 'tasks' else 'ref'}}}"
        found = await self._reads[kind](scope["state"]["caller"], ref)
        tag = etag(found.revision).encode()
        for name, value in scope["headers"]:
            if name == b"if-none-match" and tag in [known.strip() for known in value.split(b",")]:
                await send(
                    {"type": "http.response.start", "status": 304, "headers": [(b"etag", tag)]}
                )
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
        body = self._encode(found.record)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [
                    (b"content-type", b"application/json"),
                    (b"content-length", b"%d" % len(body)),
                    (b"etag", tag),
                    (b"cache-control", b"no-cache"),
                ],
            }
        )
        await send({"type": "http.response.body", "body": body, "more_body": False})
