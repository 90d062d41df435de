"""Answers that go on: content in pieces, and event streams (HTML standard, section 9.2)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from litestar.response.base import ASGIResponse
from litestar.types import Receive, Scope, Send

from undercroft.model.errors import UndercroftError
from undercroft.store.interface import Changes

HEARTBEAT = 15.0  # seconds
FIRST = 0.05  # seconds in which a store says that history is gone
EVENT_STREAM = "text/event-stream"


async def begin(content: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same content, once its first piece is there: what fails before is still an error with a
    status of its own."""
    first = await anext(content, None)

    async def pieces() -> AsyncIterator[bytes]:
        try:
            if first is not None:
                yield first
                async for piece in content:
                    yield piece
        finally:
            await close(content)

    return pieces()


async def close(content: AsyncIterator[Any]) -> None:
    """Ends an iterator that can be ended."""
    end = getattr(content, "aclose", None)
    if end is not None:
        await end()


class Streaming(ASGIResponse):
    """Sends pieces as they come, no faster than they are taken, until the caller is gone."""

    _should_set_content_length = False

    def __init__(
        self,
        content: AsyncIterator[bytes],
        media_type: str,
        *,
        headers: dict[str, str] | None = None,
        status_code: int = 200,
    ) -> None:
        super().__init__(
            media_type=media_type,
            status_code=status_code,
            headers={
                "cache-control": "no-store",
                "x-accel-buffering": "no",
                **(headers or {}),
            },
        )
        self.content = content

    async def send_body(self, send: Send, receive: Receive) -> None:
        """Sends the body; on the way out the content is closed, however it ends."""
        pump = asyncio.ensure_future(self._pump(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            pump.cancel()
            await asyncio.gather(pump, gone, return_exceptions=True)
            await close(self.content)
        if not pump.cancelled():
            pump.result()  # what went wrong in the middle ends the connection

    async def _pump(self, send: Send) -> None:
        async for piece in self.content:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await self.start_response(send)
        await self.send_body(send, receive)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Follower:
    """The changes of a watch as an event stream.

    Nothing is held for a slow reader but the one batch that is being sent: the watch reads on from
    the store when that has been taken. Each batch carries its revision as id, on its last event, so
    that whoever comes back with it neither misses nor repeats anything.
    """

    def __init__(
        self,
        source: AsyncIterator[Changes],
        render: Callable[[Changes], list[bytes]],
        stopping: asyncio.Event,
        revision: int,
    ) -> None:
        self._source = source
        self._render = render
        self._stopping = stopping
        self._revision = revision
        self._next: asyncio.Future[Changes] | None = None

    async def prepare(self) -> None:
        """Begins to watch.

        Raises:
            CompactedError: history that far back is gone.
        """
        self._next = asyncio.ensure_future(anext(self._source))
        try:
            await asyncio.wait({self._next}, timeout=FIRST)
            if self._next.done():
                self._next.result()
        except BaseException:
            self._next.cancel()
            await close(self._source)
            raise

    async def __aiter__(self) -> AsyncIterator[bytes]:
        stop: asyncio.Future[Any] = asyncio.ensure_future(self._stopping.wait())
        pending: asyncio.Future[Any] = self._next or asyncio.ensure_future(anext(self._source))
        try:
            start = msgspec.json.encode({"revision": self._revision})
            yield b"retry: 1000\n" + _event(start, self._revision, b"start")
            while not stop.done():
                await asyncio.wait(
                    [stop, pending], timeout=HEARTBEAT, return_when=asyncio.FIRST_COMPLETED
                )
                if not pending.done():
                    yield b": \n\n"
                    continue
                try:
                    changes = pending.result()
                except StopAsyncIteration:
                    return
                except UndercroftError as error:
                    yield _event(msgspec.json.encode(error.problem(), enc_hook=str), None, b"error")
                    return
                pending = asyncio.ensure_future(anext(self._source))
                found = self._render(changes)
                if found:
                    *head, last = found
                    text = b"".join(_event(data, None) for data in head)
                    yield text + _event(last, changes.revision)
        finally:
            stop.cancel()
            pending.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(stop, pending, return_exceptions=True)
            await close(self._source)


def _event(data: bytes, id: int | None, name: bytes | None = None) -> bytes:
    """One event; JSON never holds a line break, so it is one line."""
    return b"%b%bdata: %b\n\n" % (
        b"" if id is None else b"id: %d\n" % id,
        b"" if name is None else b"event: %b\n" % name,
        data,
    )
