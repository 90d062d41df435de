"""Where a fetched image comes from, and what is known of it beforehand."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from undercroft.host.environment import Environment
from undercroft.model.image import Image, ImageContent, ImageDefaults, ImageSourceKind
from undercroft.storage.catalogue import FILE_NAME, find_entry, load_catalogue, wanted_checksum
from undercroft.storage.checksums import Checksum
from undercroft.storage.decompress import compression_of, decompress
from undercroft.storage.fetch import FetchOptions, fetched
from undercroft.storage.http import check_url
from undercroft.storage.importing import UNTRUSTED, ImportOptions
from undercroft.storage.process import Progress, share_of


def downloads(environment: Environment) -> Path:
    """Where downloads are kept until they have become images."""
    return environment.directory.cached("downloads")


@asynccontextmanager
async def fetch_source(
    environment: Environment, image: Image, options: ImportOptions, progress: Progress
) -> AsyncIterator[tuple[Path, ImportOptions]]:
    """Downloads, verifies and unpacks the file that an image is to be made of.

    It stays for the length of the block. Cut off by a crash, it goes on from there the next time.

    Returns:
        The file; and ``options`` completed by what the catalogue says, where the user said
        nothing, and without the checksum: that was of the file as it came, and has been verified.

    Raises:
        NotFoundError, DataError: not in the catalogue; the catalogue makes no sense.
        As of `undercroft.storage.fetch.fetched` and `undercroft.storage.decompress.decompress`.
    """
    url = image.spec.value
    checksum = Checksum.parse(image.spec.sha256) if image.spec.sha256 else None
    if image.spec.source is ImageSourceKind.CATALOGUE:
        own = environment.data / FILE_NAME
        entry = find_entry(await asyncio.to_thread(load_catalogue, own), image.spec.value)
        url = entry.url
        if checksum is None:
            progress(0.0, "fetching the checksum")
            checksum = await wanted_checksum(entry)
        content = ImageContent(
            arch=entry.arch,
            os=entry.os,
            cloud_init=entry.cloud_init,
            agent=entry.agent,
            ssh=True,
            defaults=ImageDefaults(
                memory=entry.memory,
                firmware=image.spec.firmware or entry.firmware,
                user=image.spec.user or entry.user,
            ),
        )
        options = dataclasses.replace(
            options, content=content, format=image.spec.format or entry.format
        )
    options = dataclasses.replace(options, sha256=None)
    directory = downloads(environment)
    compression = compression_of(check_url(url).path)
    part = share_of(progress, 0.0, 0.8 if compression else 1.0)
    async with fetched(url, directory, FetchOptions(checksum=checksum), part) as path:
        if compression is None:
            yield path, options
            return
        # Beside the download, whose lock is held: nobody else unpacks it now.
        unpacked = path.with_suffix(".unpacked")
        try:
            await decompress(
                path,
                unpacked,
                compression,
                identity=UNTRUSTED,
                progress=share_of(progress, 0.8, 1.0),
            )
            yield unpacked, options
        finally:
            await asyncio.shield(asyncio.to_thread(unpacked.unlink, True))
