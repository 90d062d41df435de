"""Serial and VNC consoles as WebSockets (RFC 6455).

Bytes go as binary messages both ways. Neither side is read faster than the other takes it. Close
codes: 1000 the console ended (VM stopped), 1012 the daemon ends, 4000 + status with the message of
an error as reason; what is wrong before the opening is answered as an ordinary problem document.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import msgspec
from litestar import Response, WebSocket, get, websocket
from litestar.openapi.datastructures import ResponseSpec
from litestar.params import FromPath, QueryParameter

from undercroft.api.answers import AnyRequest, caller, errors, operations
from undercroft.api.problems import (
    MEDIA_TYPE,
    problem_body,
    to_problem,
)
from undercroft.model.errors import InvalidError, Problem, UndercroftError
from undercroft.operations.services import ByteStream

PIECE = 64 << 10
SUBPROTOCOL = "binary"  # what noVNC asks for
SCROLLBACK = QueryParameter(
    name="scrollback", required=False, description="How much to show of before, in bytes."
)
AnySocket = WebSocket[Any, Any, Any]
Write = Callable[[bytes], Awaitable[None]]


@websocket("/v1/vms/{ref:str}/console")
async def console(
    socket: AnySocket, ref: FromPath[str], scrollback: Annotated[int | None, SCROLLBACK] = None
) -> None:
    """The serial console."""

    async def attach() -> tuple[AsyncIterator[bytes], Write, Callable[[], Awaitable[None]]]:
        session = await operations(socket).vms.console(caller(socket), ref, scrollback or 0)
        return aiter(session), session.write, session.close

    await _serve(socket, attach)


@websocket("/v1/vms/{ref:str}/vnc")
async def vnc(socket: AnySocket, ref: FromPath[str]) -> None:
    """The display, as RFB (RFC 6143)."""

    async def attach() -> tuple[AsyncIterator[bytes], Write, Callable[[], Awaitable[None]]]:
        stream = await operations(socket).vms.vnc(caller(socket), ref)
        return _pieces(stream), stream.write, stream.close

    await _serve(socket, attach)


async def _pieces(stream: ByteStream) -> AsyncIterator[bytes]:
    while data := await stream.read():
        yield data


async def _serve(
    socket: AnySocket,
    attach: Callable[
        [], Awaitable[tuple[AsyncIterator[bytes], Write, Callable[[], Awaitable[None]]]]
    ],
) -> None:
    where = f"WebSocket {socket.scope['path'][:200]}"
    await socket.receive()  # websocket.connect
    try:
        output, write, detach = await attach()
    except Exception as error:
        problem, headers = to_problem(error, where)
        await deny(socket.send, problem, headers)
        return
    code, reason = 1000, "the console ended"
    try:
        wanted = socket.scope["subprotocols"]
        await socket.send(
            {
                "type": "websocket.accept",
                "subprotocol": SUBPROTOCOL if SUBPROTOCOL in wanted else None,
                "headers": [],
            }
        )
        code, reason = await _bridge(socket, output, write)
    except Exception as error:
        problem, _ = to_problem(error, where)
        code, reason = 4000 + problem.status, problem.detail
    finally:
        await detach()
    if socket.connection_state != "disconnect":
        await socket.close(code, shorten(reason))


async def _bridge(socket: AnySocket, output: AsyncIterator[bytes], write: Write) -> tuple[int, str]:
    """Carries bytes both ways until one side, or the daemon, ends; returns why."""

    async def outward() -> None:
        async for data in output:
            for start in range(0, len(data), PIECE):
                await socket.send(
                    {
                        "type": "websocket.send",
                        "bytes": data[start : start + PIECE],
                        "text": None,
                    }
                )

    async def inward() -> None:
        while True:
            message: Any = await socket.receive()
            if message["type"] != "websocket.receive":
                return
            data = message.get("bytes") or (message.get("text") or "").encode()
            if data:
                await write(data)

    stopping: asyncio.Event = socket.app.state["stopping"]
    tasks = [asyncio.ensure_future(work) for work in (outward(), inward(), _wait(stopping))]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
        if tasks[2].done():
            return 1012, "the daemon ends; the VM runs on"
        return 1000, "the console ended"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _wait(event: asyncio.Event) -> None:
    await event.wait()


async def deny(
    send: Callable[[Any], Awaitable[None]], problem: Problem, headers: dict[str, str]
) -> None:
    """Refuses a WebSocket with a problem document instead of opening it."""
    body = problem_body(problem)
    fields = {**headers, "content-type": MEDIA_TYPE, "content-length": str(len(body))}
    await send(
        {
            "type": "websocket.http.response.start",
            "status": problem.status,
            "headers": [(name.encode(), value.encode()) for name, value in fields.items()],
        }
    )
    await send({"type": "websocket.http.response.body", "body": body, "more_body": False})


def shorten(reason: str) -> str:
    """A reason that fits a close frame: at most 123 bytes (RFC 6455, section 5.5)."""
    return reason.encode()[:123].decode(errors="ignore")


def _needs_upgrade(what: str) -> UndercroftError:
    return InvalidError(
        f"the {what} is a WebSocket", action="open it with croft, or any client of RFC 6455"
    )


_UPGRADE = {
    426: ResponseSpec(
        data_container=Problem,
        description="This is a WebSocket: binary messages both ways.",
        media_type=MEDIA_TYPE,
        generate_examples=False,
    ),
    **errors(404, 409),
}


@get(
    "/v1/vms/{ref:str}/console",
    operation_id="openConsole",
    summary="Open the serial console (WebSocket)",
    tags=["consoles"],
    status_code=426,
    responses=_UPGRADE,
)
async def console_page(
    request: AnyRequest, ref: FromPath[str], scrollback: Annotated[int | None, SCROLLBACK] = None
) -> Response[bytes]:
    """Binary messages carry what the console prints and what is typed. Begins with the last
    `scrollback` bytes of output."""
    return _answer_upgrade(_needs_upgrade("serial console"))


@get(
    "/v1/vms/{ref:str}/vnc",
    operation_id="openDisplay",
    summary="Open the display (WebSocket)",
    tags=["consoles"],
    status_code=426,
    responses=_UPGRADE,
)
async def vnc_page(request: AnyRequest, ref: FromPath[str]) -> Response[bytes]:
    """Binary messages carry RFB (RFC 6143), as noVNC wants it."""
    return _answer_upgrade(_needs_upgrade("display"))


def _answer_upgrade(error: UndercroftError) -> Response[bytes]:
    problem = msgspec.structs.replace(error.problem(), status=426, title="Upgrade required")
    return Response(
        content=problem_body(problem),
        status_code=426,
        media_type=MEDIA_TYPE,
        headers={"upgrade": "websocket"},
    )
