"""Downloading an image's file over http or https: resumed, bounded, checked, retried.

    DOWNLOADS/<key>.part    what has come so far; locked (flock) by whoever works on it
    DOWNLOADS/<key>.json    a `_State`: how much of it is durable, and what it is a part of

The key stands for address and checksum. What is durable survives a kill at any point, and whoever
asks for the same file again goes on from there.

Without a checksum a resumed download relies on the server's word (If-Range, RFC 9110) that the file
is still the same. With one that word is not asked for: mirrors that take turns differ in their
ETags, and the checksum tells anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from undercroft.model.errors import (
    ChecksumError,
    FetchError,
    InvalidError,
    NoSpaceError,
    TooLargeError,
)
from undercroft.model.units import GiB, KiB, MiB, format_size
from undercroft.storage.checksums import Checksum
from undercroft.storage.files import disk_full_is_clear, hash_file, require_space
from undercroft.storage.http import Answer, HttpLimits, Temporary, check_url, get, plain_url
from undercroft.storage.process import Progress, no_progress, share_of
from undercroft.storage.threads import Stop, in_thread

__all__ = ["FetchOptions", "fetch_text", "fetched", "sweep_downloads"]

_PIECE = 256 * KiB
_TEXT_LIMIT = 4 * MiB
_SLOWEST = 1 * KiB  # bytes per second; slower is as good as stuck
_WORTH = 1 * MiB  # an attempt that brought this much was no failure
_SAVE_EVERY = 5.0  # seconds
_LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
_RANGE = re.compile(r"bytes (?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18}|\*)")


@dataclass(frozen=True)
class FetchOptions:
    """How to download. ``max_size`` in bytes. ``attempts``: how many may fail in a row, with
    ``backoff`` seconds after the first and twice as many after each further. What has come is made
    durable every ``checkpoint`` bytes, and every few seconds."""

    checksum: Checksum | None = None
    max_size: int = 256 * GiB
    attempts: int = 6
    backoff: float = 1.0
    checkpoint: int = 32 * MiB
    http: HttpLimits = field(default_factory=HttpLimits)


class _State(msgspec.Struct, kw_only=True):
    """``have``: bytes that are durable. ``total``: None while unknown. ``etag`` and ``modified``:
    what the server said of the version that this is a part of."""

    url: str
    have: int = 0
    total: int | None = None
    etag: str | None = None
    modified: str | None = None
    complete: bool = False


@asynccontextmanager
async def fetched(
    url: str,
    directory: Path,
    options: FetchOptions | None = None,
    progress: Progress = no_progress,
) -> AsyncIterator[Path]:
    """Downloads a file into the directory, where it stays for the length of the block.

    Whoever wants the same file meanwhile waits. It is gone after the block, unless that was
    cancelled or failed through no fault of the file: then the next who asks has it at once.

    Raises:
        InvalidError: not an address to fetch from.
        FetchError: the server does not have it, or does not answer after several attempts.
        ChecksumError: it is not what was announced.
        TooLargeError: it is larger than it may be.
        NoSpaceError: it does not fit.
    """
    options = options or FetchOptions()
    check_url(url)
    download = _Download(url, directory, options, progress)
    keep = True
    try:
        try:
            await in_thread(download.run)
        except OSError as error:
            raise FetchError(
                f"the download cannot be kept in {directory}: {error.strerror}",
                object=str(directory),
            ) from error
        yield download.path
        keep = False
    except (InvalidError, TooLargeError, NoSpaceError, ChecksumError):
        keep = False
        raise
    finally:
        await asyncio.shield(asyncio.to_thread(download.close, keep))


async def fetch_text(url: str, options: FetchOptions | None = None) -> str:
    """The content of a small text file, such as a list of checksums (at most 4 MiB).

    Raises:
        InvalidError, FetchError, TooLargeError: as of `fetched`.
    """
    options = options or FetchOptions()
    check_url(url)

    def work(stop: Stop) -> str:
        patience = _Patience(url, options, stop, no_progress)
        while True:
            try:
                with get(url, {}, options.http, stop) as answer:
                    _expect(answer, (200,))
                    data = bytearray()
                    while piece := answer.read(_PIECE):
                        data += piece
                        if len(data) > _TEXT_LIMIT:
                            raise TooLargeError(
                                f"{plain_url(url)} is too large to be a list", object=url
                            )
                    if answer.length:
                        raise Temporary("the connection was cut")
                    return data.decode(errors="replace")
            except Temporary as reason:
                patience.failed(reason, 0)

    return await in_thread(work)


def sweep_downloads(directory: Path, older_than: float) -> None:
    """Removes downloads that nobody has worked on since then (seconds since 1970)."""
    for path in directory.glob("*"):
        with contextlib.suppress(OSError):
            if path.suffix == ".part":
                _sweep_idle(path, older_than)
            elif not path.with_suffix(".part").exists() and path.lstat().st_mtime < older_than:
                path.unlink()


def _sweep_idle(path: Path, older_than: float) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_mtime < older_than:
            for other in path.parent.glob(f"{path.stem}.*"):
                other.unlink()
    finally:
        os.close(fd)


class _Patience:
    """Decides whether to try again, and waits until then."""

    def __init__(self, url: str, options: FetchOptions, stop: Stop, progress: Progress) -> None:
        self._url = url
        self._options = options
        self._stop = stop
        self._progress = progress
        self._failures = 0

    def failed(self, reason: Temporary, gained: int, fraction: float = 0.0) -> None:
        """Waits for the next attempt; ``gained``: bytes that this one brought nevertheless.

        Raises:
            FetchError: it has been tried often enough.
        """
        self._failures = 1 if gained >= _WORTH else self._failures + 1
        if self._failures >= self._options.attempts:
            raise FetchError(
                f"{plain_url(self._url)} could not be fetched: {reason}",
                object=self._url,
                action="check the address and the network, then try again",
            ) from reason
        pause = self._options.backoff * 2 ** (self._failures - 1)
        pause = min(max(pause, reason.after or 0.0), _LONGEST_WAIT)
        self._progress(fraction, f"{reason}; trying again in {pause:.0f} s")
        self._stop.wait(pause)


class _Download:
    """One file on its way. All methods block; `run` first, `close` last."""

    def __init__(self, url: str, directory: Path, options: FetchOptions, progress: Progress):
        key = hashlib.sha256(f"{url}\n{options.checksum}".encode()).hexdigest()[:32]
        self.url = url
        self.path = directory / f"{key}.part"
        self._options = options
        self._progress = progress
        self._what = f"downloading {plain_url(url).rpartition('/')[2] or plain_url(url)}"
        self._fd = -1
        self._state = _State(url=url)
        self._at = 0  # bytes written, durable or not
        self._resumed = False

    def run(self, stop: Stop) -> None:
        """Downloads and verifies, or goes on with that."""
        with disk_full_is_clear(self._what, self.path.parent.parent):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock(stop)
            self._load()
            self._complete(stop)
            if not self._verified(stop):
                if self._resumed:
                    # Perhaps it was put together of two versions; a whole one decides.
                    self._start_over()
                    self._complete(stop)
                if not self._resumed or not self._verified(stop):
                    raise ChecksumError(
                        f"{plain_url(self.url)} is not the file that was announced: its checksum "
                        f"is not {self._options.checksum}",
                        object=self.url,
                        action="try again later: the server may just be changing it; else check "
                        "where the checksum comes from",
                    )

    def close(self, keep: bool) -> None:
        """Lets go of the file; without ``keep`` it is removed."""
        if self._fd < 0:
            return
        if not keep or self._at == 0:
            self.path.with_suffix(".json").unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1

    def _lock(self, stop: Stop) -> None:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever had it may have removed it: then this is a file without a name.
                if os.path.samestat(os.fstat(fd), self.path.stat()):
                    self._fd, fd = fd, -1
                    return
            except BlockingIOError:
                self._progress(0.0, "waiting for another download of the same file")
                stop.wait(0.2)
            except FileNotFoundError:
                continue
            finally:
                if fd >= 0:
                    os.close(fd)

    # -- what is there ----------------------------------------------------------------------

    def _load(self) -> None:
        """Takes up what an earlier attempt left."""
        state = None
        with contextlib.suppress(FileNotFoundError, msgspec.DecodeError):
            state = msgspec.json.decode(self.path.with_suffix(".json").read_bytes(), type=_State)
        size = os.fstat(self._fd).st_size
        if state is None or state.url != self.url or not 0 < state.have <= size:
            self._start_over()
            return
        self._state = state
        self._at = state.have
        self._resumed = True
        os.truncate(self._fd, self._at)

    def _start_over(self) -> None:
        os.truncate(self._fd, 0)
        self._at = 0
        self._state = _State(url=self.url)

    def _save(self) -> None:
        """Makes what has come durable, and then what is known of it."""
        os.fdatasync(self._fd)
        self._state.have = self._at
        target = self.path.with_suffix(".json")
        fresh = self.path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(self._state))
        fresh.rename(target)

    def _verified(self, stop: Stop) -> bool:
        checksum = self._options.checksum
        if checksum is None:
            return True
        part = share_of(self._progress, 0.95, 1.0)
        total = max(self._at, 1)

        def report(done: int) -> None:
            part(done / total, "checking the download")

        return hash_file(self.path, stop, report, checksum.algorithm) == checksum.value

    # -- what is still missing --------------------------------------------------------------

    def _complete(self, stop: Stop) -> None:
        """Asks for what is missing until nothing is."""
        if self._state.complete and self._options.checksum is not None:
            return
        patience = _Patience(self.url, self._options, stop, self._progress)
        self._state.complete = False
        while not self._state.complete:
            before = self._at
            try:
                self._attempt(stop)
            except Temporary as reason:
                patience.failed(reason, self._at - before, self._fraction())
        self._save()

    def _attempt(self, stop: Stop) -> None:
        """One request. Returns when the file is complete, or has to be begun anew."""
        headers = {}
        validator = self._validator()
        if self._at and validator is None and self._options.checksum is None:
            self._start_over()
        if self._at:
            headers["Range"] = f"bytes={self._at}-"
            if validator is not None and self._options.checksum is None:
                headers["If-Range"] = validator
        with get(self.url, headers, self._options.http, stop) as answer:
            _expect(answer, (200, 206, 416) if self._at else (200,))
            start, end, total = _content_range(answer)
            if answer.status == 416 and total == self._at:
                self._state.complete = True  # there was nothing left to send
            elif answer.status == 200 or (
                answer.status == 206 and start == self._at and self._state.total in (None, total)
            ):
                if answer.status == 200 and self._at:
                    self._start_over()
                if answer.status == 200:
                    total = answer.length
                    self._state.etag = answer.header("ETag")
                    self._state.modified = answer.header("Last-Modified")
                self._state.total = total
                self._receive(answer, end, stop)
            else:
                self._start_over()

    def _validator(self) -> str | None:
        """What If-Range takes: a strong ETag, or else a date."""
        etag = self._state.etag
        return etag if etag and etag.startswith('"') else self._state.modified

    def _receive(self, answer: Answer, end: int | None, stop: Stop) -> None:
        """Writes the body behind what is there."""
        self._check_size(self._state.total or 0)
        require_space(self._what, self.path.parent, (self._state.total or self._at) - self._at)
        durable, saved = self._at, time.monotonic()
        since, received = saved, 0
        try:
            while piece := answer.read(_PIECE):
                self._check_size(self._at + len(piece))
                _write(self._fd, piece, self._at)
                self._at += len(piece)
                received += len(piece)
                self._report()
                now = time.monotonic()
                if self._at - durable >= self._options.checkpoint or now - saved > _SAVE_EVERY:
                    require_space(self._what, self.path.parent, 0)
                    self._save()
                    durable, saved = self._at, now
                if now - since > self._options.http.answer:
                    if received < _SLOWEST * (now - since):
                        raise Temporary(f"less than {_SLOWEST} bytes per second come")
                    since, received = now, 0
            expected = self._state.total if end is None else end + 1
            if expected is not None and self._at < expected:
                raise Temporary(
                    f"the connection was cut after {format_size(self._at)} of "
                    f"{format_size(self._state.total or expected)}"
                )
            self._state.complete = True
            self._state.total = self._at
        finally:
            self._save()

    def _check_size(self, size: int) -> None:
        if size > self._options.max_size:
            raise TooLargeError(
                f"{plain_url(self.url)} is larger than {format_size(self._options.max_size)}",
                object=self.url,
                action="check the address",
            )

    def _fraction(self) -> float:
        """How far it is; 0 while nobody knows."""
        return 0.95 * self._at / self._state.total if self._state.total else 0.0

    def _report(self) -> None:
        whole = f" of {format_size(self._state.total)}" if self._state.total else ""
        self._progress(self._fraction(), f"downloading {format_size(self._at)}{whole}")


def _expect(answer: Answer, statuses: tuple[int, ...]) -> None:
    if answer.status not in statuses:
        raise FetchError(
            f"{plain_url(answer.url)} cannot be fetched: the server answers {answer.status}",
            object=answer.url,
            action="check the address" if answer.status in (404, 410) else None,
            status=answer.status,
        )


def _content_range(answer: Answer) -> tuple[int | None, int | None, int | None]:
    """First byte, last byte and total of a Content-Range header, as far as it tells."""
    match = _RANGE.fullmatch((answer.header("Content-Range") or "").strip())
    if match is None or answer.status == 200:
        return None, None, None
    first, last, total = (int(n) if n and n != "*" else None for n in match.groups())
    return first, last, total


def _write(fd: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        view = view[written:]
        at += written
