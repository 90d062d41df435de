"""Into a running VM over REST: programs, files, screen and console log."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated

import msgspec
from litestar import Controller, Response, get, post, put
from litestar.params import FromPath, JSONBody, QueryParameter
from litestar.response.base import ASGIResponse

from undercroft.api.answers import AnyRequest, caller, errors, operations
from undercroft.api.streams import Streaming, begin
from undercroft.model.errors import InvalidError
from undercroft.model.requests import ExecRequest, ExecResult

DEFAULT_LOG = 64 << 10
PATH = QueryParameter(name="path", description="An absolute path in the guest.")
MODE = QueryParameter(
    name="mode", required=False, description="Permissions of the file in octal, such as 0644."
)
BYTES = QueryParameter(
    name="bytes",
    required=False,
    description=f"How much of the end, in bytes; by default {DEFAULT_LOG}.",
)


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """A file that was written: its size in bytes."""

    size: int


class GuestController(Controller):
    """What needs the guest's own help, or looks at it from outside."""

    path = "/v1/vms/{ref:str}"
    tags = ["guests"]

    @post(
        "/exec",
        operation_id="execInVM",
        summary="Run a program in the guest",
        status_code=200,
        request_max_body_size=32 << 20,
        responses=errors(404, 409, 413, 501, 502, 504),
    )
    async def exec_in_vm(
        self, request: AnyRequest, ref: FromPath[str], data: JSONBody[ExecRequest]
    ) -> Response[ExecResult]:
        """Runs a program through the guest agent and waits for its end. Input and output are
        base64."""
        result = await operations(request).vms.exec(caller(request), ref, data)
        return Response(content=result, media_type="application/json")

    @get(
        "/files",
        operation_id="readFile",
        summary="Read a file of the guest",
        media_type="application/octet-stream",
        responses=errors(404, 409, 501, 502, 504),
    )
    async def read_file(
        self, request: AnyRequest, ref: FromPath[str], path: Annotated[str, PATH]
    ) -> ASGIResponse:
        """The file's content, as a stream."""
        content = await operations(request).vms.read_file(caller(request), ref, path)
        return Streaming(await begin(content), "application/octet-stream")

    @put(
        "/files",
        operation_id="writeFile",
        summary="Write a file of the guest",
        request_max_body_size=None,
        responses=errors(404, 409, 501, 502, 504, 507),
    )
    async def write_file(
        self,
        request: AnyRequest,
        ref: FromPath[str],
        path: Annotated[str, PATH],
        mode: Annotated[str | None, MODE] = None,
    ) -> Response[Written]:
        """Takes the body, of any length, as the file's content."""
        size = await operations(request).vms.write_file(
            caller(request), ref, path, body_pieces(request), _mode(mode)
        )
        return Response(content=Written(size=size), media_type="application/json")

    @get(
        "/screenshot",
        operation_id="screenshotVM",
        summary="Take a picture of the display",
        media_type="image/png",
        responses=errors(404, 409, 501, 502),
    )
    async def screenshot(self, request: AnyRequest, ref: FromPath[str]) -> Response[bytes]:
        """The display as PNG."""
        png = await operations(request).vms.screenshot(caller(request), ref)
        return Response(content=png, media_type="image/png", headers={"cache-control": "no-store"})

    @get(
        "/log",
        operation_id="readLog",
        summary="Read what the serial console printed",
        media_type="text/plain",
        responses=errors(404),
    )
    async def log(
        self, request: AnyRequest, ref: FromPath[str], bytes: Annotated[int | None, BYTES] = None
    ) -> Response[bytes]:
        """The end of the console's output, also of a VM that is stopped. As the guest wrote it: it
        need not be valid UTF-8."""
        limit = DEFAULT_LOG if bytes is None else bytes
        text = await operations(request).vms.log(caller(request), ref, limit)
        return Response(content=text, media_type="text/plain")


async def body_pieces(request: AnyRequest) -> AsyncIterator[bytes]:
    """The body as it arrives.

    Raises:
        InvalidError: the sender went away before its end.
    """
    while True:
        message = await request.receive()
        if message["type"] != "http.request":
            raise InvalidError("the connection ended before the content did")
        if message["body"]:
            yield message["body"]
        if not message["more_body"]:
            return


def _mode(text: str | None) -> int | None:
    if text is None:
        return None
    digits = text.removeprefix("0o")
    if not 1 <= len(digits) <= 5 or set(digits) - set("01234567"):
        raise InvalidError(f"{text[:20]!r} is not a file mode", action="write it like 0644")
    return int(digits, 8)
