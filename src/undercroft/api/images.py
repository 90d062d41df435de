"""Images over REST, see `undercroft.operations.images`."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from pathlib import Path
from typing import Annotated, Any

from litestar import Controller, Response, delete, get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, JSONBody, QueryParameter

from undercroft.api.answers import (
    FORCE,
    AnyRequest,
    PageOf,
    answer_listing,
    answer_record,
    answer_task,
    caller,
    errors,
    operations,
)
from undercroft.api.guests import body_pieces
from undercroft.api.query import Query
from undercroft.model.errors import NoSpaceError, UndercroftError
from undercroft.model.image import DiskFormat, Image, ImageSourceKind
from undercroft.model.names import check_name
from undercroft.model.requests import ImageCreate
from undercroft.model.task import Task

_BATCH = 1 << 20
NAME = QueryParameter(name="name", description="What the image shall be called.")
FORMAT = QueryParameter(name="format", required=False, description="The format of the content.")
SHA256 = QueryParameter(name="sha256", required=False, description="What it must have, in hex.")
FIRMWARE = QueryParameter(name="firmware", required=False, description="bios or uefi.")
USER = QueryParameter(name="user", required=False, description="The account that the image has.")
REPLACE = QueryParameter(
    name="replace", required=False, description="Take the name over from an older image."
)


class ImageController(Controller):
    """Building, fetching, sending, looking at and removing."""

    path = "/v1"
    tags = ["images"]

    @get("/images", operation_id="listImages", summary="List images", responses=errors(304))
    async def list_images(
        self, request: AnyRequest, asked: NamedDependency[Query]
    ) -> Response[PageOf[Image]]:
        """All images, also those that are still being made."""
        listing = await operations(request).images.list(caller(request))
        return answer_listing(request, Image, listing, asked)

    @post(
        "/images",
        operation_id="createImage",
        summary="Build, fetch or import an image",
        status_code=202,
        responses=errors(409, 413, 501, 507),
    )
    async def create_image(
        self, request: AnyRequest, data: JSONBody[ImageCreate]
    ) -> Response[Task]:
        """From packages, a file of the daemon's host, an address, or the catalogue."""
        return answer_task(await operations(request).images.create(caller(request), data))

    @post(
        "/images/upload",
        operation_id="uploadImage",
        summary="Send an image",
        status_code=202,
        request_max_body_size=None,
        responses=errors(409, 507),
    )
    async def upload_image(
        self,
        request: AnyRequest,
        name: Annotated[str, NAME],
        format: Annotated[DiskFormat | None, FORMAT] = None,
        sha256: Annotated[str | None, SHA256] = None,
        firmware: Annotated[str | None, FIRMWARE] = None,
        user: Annotated[str | None, USER] = None,
        replace: Annotated[bool, REPLACE] = False,
    ) -> Response[Task]:
        """Takes the body, of any length, as the image's content; then imports it."""
        who, images = caller(request), operations(request).images
        path = images.upload_path(who, check_name(name, "image"))
        try:
            await _receive(request, path)
            task = await images.create(
                who,
                ImageCreate(
                    source=ImageSourceKind.UPLOAD,
                    value=path.name,
                    name=name,
                    sha256=sha256,
                    format=format,
                    firmware=firmware,
                    user=user,
                    replace=replace,
                ),
            )
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink()
            raise
        return answer_task(task)

    @get(
        "/images/{ref:str}",
        operation_id="getImage",
        summary="Show an image",
        responses=errors(304, 404),
    )
    async def get_image(self, request: AnyRequest, ref: FromPath[str]) -> Response[Image]:
        """The image with this name or id."""
        return answer_record(request, await operations(request).images.get(caller(request), ref))

    @delete(
        "/images/{ref:str}",
        operation_id="removeImage",
        summary="Remove an image",
        status_code=202,
        responses=errors(404, 409),
    )
    async def remove_image(
        self, request: AnyRequest, ref: FromPath[str], force: Annotated[bool, FORCE] = False
    ) -> Response[Task]:
        """Removes an image that no VM is made from. `force`: also while it is being made."""
        task = await operations(request).images.remove(caller(request), ref, force=force)
        return answer_task(task)

    @get("/catalogue", operation_id="listCatalogue", summary="List images that can be fetched")
    async def catalogue(self, request: AnyRequest) -> Response[PageOf[dict[str, Any]]]:
        """The public images of distributions that are known by name."""
        items = await operations(request).images.catalogue(caller(request))
        return Response(content=PageOf(items=items, revision=0), media_type="application/json")


async def _receive(request: AnyRequest, path: Path) -> None:
    """Writes the body to a new file, without holding more than a little of it in memory."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            batch = bytearray()
            async for piece in body_pieces(request):
                batch += piece
                if len(batch) >= _BATCH:
                    await asyncio.to_thread(_write, fd, bytes(batch))
                    batch.clear()
            await asyncio.to_thread(_write, fd, bytes(batch))
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(
                "the disk is full: the image was not taken",
                object=str(path.parent),
                action="make room, or use a data directory on a larger disk",
            ) from None
        raise UndercroftError(
            f"the image cannot be written: {error.strerror}", object=str(path.parent)
        ) from error


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
