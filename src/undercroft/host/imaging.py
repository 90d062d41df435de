"""How images come to be: built, imported, fetched, or looked up in the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.host.files import remove_tree
from undercroft.host.outcome import PROGRESS_INTERVAL, TaskRun
from undercroft.model.errors import InvalidError
from undercroft.model.image import Image, ImageContent, ImageDefaults, ImageSourceKind
from undercroft.storage.images import ImageStore
from undercroft.storage.importing import ImportOptions, import_image
from undercroft.storage.process import share_of

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class MadeImage:
    """What was made: its digest, its size on the host in bytes, its content."""

    digest: str
    size: int
    content: ImageContent


@asynccontextmanager
async def reported(run: TaskRun) -> AsyncIterator[Progress]:
    """A plain progress function whose last word is written into the task twice a second."""
    last: tuple[float, str] | None = None

    def note(fraction: float, phase: str) -> None:
        nonlocal last
        last = (fraction, phase)

    async def write() -> None:
        told: tuple[float, str] | None = None
        while True:
            if last is not None and last != told:
                told = last
                await run.progress(*told)
            await asyncio.sleep(PROGRESS_INTERVAL)

    writing = asyncio.create_task(write())
    try:
        yield note
    finally:
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing


async def make_image(environment: Environment, image: Image, run: TaskRun) -> MadeImage:
    """Makes an image from its source. Whatever is cut off leaves only things in DATA/tmp, which
    are removed here or by the next daemon.

    Raises:
        InvalidError, NotFoundError, HostileImageError, ChecksumError, FetchError, NoSpaceError,
        MissingToolError: see `undercroft.storage`.
    """
    store = ImageStore(environment.directory.images, environment.tmp)
    async with reported(run) as progress:
        if image.spec.source is ImageSourceKind.BUILD:
            digest, content = await _build(store, image, progress)
        elif image.spec.source in (ImageSourceKind.URL, ImageSourceKind.CATALOGUE):
            digest, content = await _fetch(environment, store, image, progress)
        else:
            digest, content = await _import(environment, store, image, progress)
    return MadeImage(digest=digest, size=await store.usage(digest), content=content)


async def _build(store: ImageStore, image: Image, progress: Progress) -> tuple[str, ImageContent]:
    name, _, release = image.spec.value.partition(":")
    work = store.new_directory()
    try:
        target, tmp = work / "image", work / "work"
        target.mkdir()
        tmp.mkdir(mode=0o755)
        if name == "tiny":
            from undercroft.storage.build.tiny import build_tiny

            content = await build_tiny(target, tmp, release=release or "12", progress=progress)
        elif name == "debian":
            from undercroft.storage.build.debian import build_debian

            content = await build_debian(target, tmp, release=release or "12", progress=progress)
        else:
            raise InvalidError(
                f"there is nothing to build called {image.spec.value[:80]!r}",
                action="build tiny or debian:12; import others with: croft image import",
            )
        return await store.add(target, content)
    finally:
        await asyncio.shield(asyncio.to_thread(remove_tree, work))


async def _import(
    environment: Environment, store: ImageStore, image: Image, progress: Progress
) -> tuple[str, ImageContent]:
    uploaded = image.spec.source is ImageSourceKind.UPLOAD
    source = environment.tmp / image.spec.value if uploaded else Path(image.spec.value)
    return await import_image(store, source, _options(image, take=uploaded), progress)


async def _fetch(
    environment: Environment, store: ImageStore, image: Image, progress: Progress
) -> tuple[str, ImageContent]:
    from undercroft.host.fetching import fetch_source

    options = _options(image, take=True)
    part = share_of(progress, 0.0, 0.7)
    async with fetch_source(environment, image, options, part) as (source, completed):
        return await import_image(store, source, completed, share_of(progress, 0.7, 1.0))


def _options(image: Image, *, take: bool) -> ImportOptions:
    """What is known of a stranger's image: what its user says, and else the usual of a cloud image.
    It is assumed to read a cloud-init seed, which does no harm where it does not."""
    defaults = ImageDefaults(firmware=image.spec.firmware or "bios", user=image.spec.user)
    content = ImageContent(os=image.meta.name, cloud_init=True, ssh=True, defaults=defaults)
    return ImportOptions(
        format=image.spec.format,
        sha256=image.spec.sha256,
        content=content,
        take=take,
    )


async def remove_image(environment: Environment, image: Image) -> None:
    """Removes an image's files, unless another image has the same content."""
    digest = image.status.digest
    if digest is None:
        return
    listing = await environment.store.list(Image)
    if any(
        item.record.status.digest == digest and item.record.meta.id != image.meta.id
        for item in listing.items
    ):
        return
    await ImageStore(environment.directory.images, environment.tmp).remove(digest)
