"""Putting a VM's disks and files into a repository. All functions here block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from undercroft.model.backup import CHUNK, SEGMENT, BackupDisk, BackupFile
from undercroft.storage.backup.maps import SPAN, chunks_in, load_map, segment_count
from undercroft.storage.backup.records import CHUNK_KIND, MAP_KIND, ZERO_HASH, digest_of
from undercroft.storage.threads import Stop

READ = 1 << 20  # bytes that are read at once where chunks follow each other
_ZEROES = bytes(CHUNK)
MOST_FILE = 64 << 20  # bytes that firmware variables or a TPM's state never have


class Sink(Protocol):
    """Where contents go: a repository's packs, or an archive. ``careful``: see `Packs`."""

    careful: bool

    def has(self, digest: bytes) -> bool:
        """Whether a content is there."""

    def get(self, digest: bytes) -> bytes:
        """A content."""

    def put(self, kind: int, content: bytes | bytearray | memoryview, digest: bytes = b"") -> bytes:
        """Adds a content unless it is there; what names it."""


class Source(Protocol):
    """A disk at one moment. Sizes and offsets in bytes."""

    @property
    def size(self) -> int:
        """Its bytes."""

    def data(self, offset: int, length: int) -> Iterable[tuple[int, int]]:
        """The parts of a range (offset, length) that may hold anything but zeroes."""

    def read(self, ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, bytearray]]:
        """The content of ranges, in their order."""


class Tally:
    """What was done, in bytes, and how far it is (``done`` of ``total``)."""

    def __init__(self, stop: Stop, report: Callable[[float], None]) -> None:
        self.stop = stop
        self._report = report
        self.read = 0
        self.changed = 0
        self.total = 1
        self.done = 0

    def step(self, done: int) -> None:
        """So much more is done."""
        self.stop.check()
        self.done += done
        self._report(min(1.0, self.done / max(1, self.total)))


def put_disk(
    sink: Sink,
    source: Source,
    tally: Tally,
    *,
    parent: BackupDisk | None,
    changed: Sequence[tuple[int, int]] | None,
    bus: str,
    read_only: bool,
) -> BackupDisk:
    """Puts a disk into a sink. ``parent``: what an earlier backup has of it; ``changed``: the parts
    (offset, length; ascending) in which it differs from that, None: not known.

    Raises:
        UndercroftError, OSError: it could not be read or written.
    """
    size = source.size
    maps: list[str | None] = []
    base = parent if parent is not None and parent.size <= size else None
    marked: set[int] | None = None
    if changed is not None and base is not None:
        marked = set()
        beyond = [(base.size // CHUNK * CHUNK, size - base.size // CHUNK * CHUNK)]
        for offset, length in [*changed, *(beyond if size > base.size else [])]:
            marked.update(range(offset // SPAN, -(-(offset + length) // SPAN)))
    for segment in range(segment_count(size)):
        covered = min(SPAN, size - segment * SPAN)
        if marked is not None and base is not None and segment not in marked:
            maps.append(base.maps[segment])
            tally.step(covered)
            continue
        old = _old_map(sink, base, size, segment)
        wanted: set[int] | None = None
        if marked is not None and base is not None:
            wanted = _chunks_of(changed or (), segment, size)
            if size > base.size:
                wanted |= set(range(max(0, base.size // CHUNK - segment * SEGMENT), len(old)))
        maps.append(_put_segment(sink, source, tally, segment, old, wanted))
        tally.step(covered)
    return BackupDisk(size=size, bus=bus, read_only=read_only, maps=tuple(maps))


def _old_map(sink: Sink, base: BackupDisk | None, size: int, segment: int) -> list[bytes]:
    count = chunks_in(size, segment)
    if base is None or segment >= len(base.maps):
        return [ZERO_HASH] * count
    old = load_map(sink.get, base, segment)
    return old + [ZERO_HASH] * (count - len(old))


def _chunks_of(changed: Sequence[tuple[int, int]], segment: int, size: int) -> set[int]:
    """The chunks of a segment that the changed parts touch."""
    start, end = segment * SPAN, min(size, (segment + 1) * SPAN)
    found: set[int] = set()
    for offset, length in changed:
        low, high = max(offset, start), min(offset + length, end)
        if low < high:
            found.update(range((low - start) // CHUNK, -(-(high - start) // CHUNK)))
    return found


def _put_segment(
    sink: Sink,
    source: Source,
    tally: Tally,
    segment: int,
    old: list[bytes],
    wanted: set[int] | None,
) -> str | None:
    start = segment * SPAN
    new = list(old)
    asked = sorted(wanted) if wanted is not None else list(range(len(old)))
    held: set[int] = set()
    for first, last in _runs(asked):
        low, high = start + first * CHUNK, min(source.size, start + last * CHUNK)
        for offset, length in source.data(low, high - low):
            held.update(range((offset - start) // CHUNK, -(-(offset + length - start) // CHUNK)))
    for index in asked:
        if index not in held:
            new[index] = ZERO_HASH
    ranges = []
    for first, last in _runs(sorted(held & set(asked))):
        for at in range(first, last, READ // CHUNK):
            low = start + at * CHUNK
            high = min(source.size, start + min(last, at + READ // CHUNK) * CHUNK)
            ranges.append((low, high - low))
    for offset, content in source.read(ranges):
        tally.stop.check()
        tally.read += len(content)
        view = memoryview(content)
        for at in range(0, len(content), CHUNK):
            index = (offset + at - start) // CHUNK
            new[index] = _put_chunk(sink, view[at : at + CHUNK], old[index])
    tally.changed += sum(CHUNK for a, b in zip(old, new, strict=True) if a != b)
    if not any(digest != ZERO_HASH for digest in new):
        return None
    return sink.put(MAP_KIND, b"".join(new)).hex()


def _put_chunk(sink: Sink, content: memoryview, old: bytes) -> bytes:
    if content == _ZEROES[: len(content)]:
        return ZERO_HASH
    digest = digest_of(content)
    if digest == old and not sink.careful:
        return digest
    return sink.put(CHUNK_KIND, content, digest)


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges (first, last + 1)."""
    start = previous = None
    for index in indices:
        if start is None or previous is None:
            start = previous = index
        elif index == previous + 1:
            previous = index
        else:
            yield start, previous + 1
            start = previous = index
    if start is not None and previous is not None:
        yield start, previous + 1


def put_files(sink: Sink, directory: Path, names: Sequence[str]) -> tuple[BackupFile, ...]:
    """Puts files into a sink: those of these names in a directory, and those in directories of
    these names.

    Raises:
        OSError: they could not be read.
    """
    found = []
    for name in names:
        path = directory / name
        below = sorted(p for p in path.iterdir()) if path.is_dir() else [path]
        for file in below:
            if not file.is_file() or file.is_symlink() or file.stat().st_size > MOST_FILE:
                continue
            content = file.read_bytes()
            found.append(
                BackupFile(
                    name=str(file.relative_to(directory)),
                    size=len(content),
                    mode=file.stat().st_mode & 0o777,
                    chunks=tuple(
                        sink.put(CHUNK_KIND, content[at : at + CHUNK]).hex()
                        for at in range(0, len(content), CHUNK)
                    ),
                )
            )
    return tuple(found)
