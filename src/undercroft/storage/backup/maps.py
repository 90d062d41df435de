"""Maps: which content each chunk of a disk has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from undercroft.model.backup import CHUNK, SEGMENT, BackupDisk
from undercroft.model.errors import DataCorruptError
from undercroft.storage.backup.records import ZERO_HASH

SPAN = CHUNK * SEGMENT
"""Bytes of a disk that one map covers."""


def chunk_count(size: int) -> int:
    """The chunks of a disk; the last may be shorter."""
    return -(-size // CHUNK)


def segment_count(size: int) -> int:
    """The maps of a disk."""
    return -(-size // SPAN)


def chunks_in(size: int, segment: int) -> int:
    """The chunks that a map of a disk covers."""
    return min(SEGMENT, chunk_count(size) - segment * SEGMENT)


def split_map(content: bytes, count: int) -> list[bytes]:
    """The checksums in a map.

    Raises:
        DataCorruptError: it has not as many.
    """
    if len(content) != count * 32:
        raise DataCorruptError("a map is damaged: it is too short or too long")
    return [content[at : at + 32] for at in range(0, len(content), 32)]


def load_map(get: Callable[[bytes], bytes], disk: BackupDisk, segment: int) -> list[bytes]:
    """The checksums of the chunks in a segment of a disk.

    Raises:
        DataCorruptError: the map is gone or damaged.
    """
    count = chunks_in(disk.size, segment)
    digest = disk.maps[segment]
    if digest is None:
        return [ZERO_HASH] * count
    return split_map(get(bytes.fromhex(digest)), count)


def chunk_length(size: int, index: int) -> int:
    """Bytes of a chunk."""
    return min(CHUNK, size - index * CHUNK)


def walk(
    get: Callable[[bytes], bytes], disk: BackupDisk
) -> Iterator[tuple[int, list[bytes] | DataCorruptError]]:
    """All segments of a disk that are not all zeroes, with their checksums, or what is wrong."""
    if len(disk.maps) != segment_count(disk.size):
        yield 0, DataCorruptError("a disk has too few or too many maps")
        return
    for segment, digest in enumerate(disk.maps):
        if digest is None:
            continue
        try:
            yield segment, load_map(get, disk, segment)
        except DataCorruptError as error:
            yield segment, error
