"""Sending files to the daemon so that it can go on after an interruption of either side."""

from __future__ import annotations

import hashlib
import os
import time

from undercroft.cli.errors import UsageError, ours
from undercroft.client.raw import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any, Protocol

    from undercroft.cli.context import Croft

    class Source(Protocol):
        """What is sent. ``key`` is the same for the same content; ``size`` None: not known yet."""

        key: str
        size: int | None

        def read(self, at: int, length: int) -> bytes:
            """Up to ``length`` bytes from ``at`` on, empty at the end."""


PIECE = 16 << 20  # bytes of one request
_GONE = 30.0  # seconds for which the daemon may be away meanwhile


class Pipe:
    """What comes through a pipe: read once, so only the last piece can be sent again."""

    def __init__(self, descriptor: int) -> None:
        self.size: int | None = None
        self.key = os.urandom(16).hex()
        self._descriptor = descriptor
        self._at = 0
        self._piece = b""

    def read(self, at: int, length: int) -> bytes:
        """Up to ``length`` bytes, from the last piece or the one after it."""
        end = self._at + len(self._piece)
        if at == end:
            pieces: list[bytes] = []
            while length and (data := os.read(self._descriptor, min(length, 1 << 20))):
                pieces.append(data)
                length -= len(data)
            self._at, self._piece = end, b"".join(pieces)
        if not self._at <= at <= self._at + len(self._piece):
            raise UsageError("what came through the pipe is gone", "start again")
        return self._piece[at - self._at :][:length] if at != end else self._piece


class Files:
    """Files one after the other, with what goes in front of each and behind all: one file, or an
    archive of several that is made on the way."""

    def __init__(self, parts: Sequence[tuple[bytes, int | None]]) -> None:
        """``parts``: bytes, followed by the content of an open file (None: nothing)."""
        self._spans: list[tuple[int, int, bytes | int]] = []
        at = 0
        identity = hashlib.sha256()
        for head, descriptor in parts:
            identity.update(head)
            if head:
                self._spans.append((at, len(head), head))
                at += len(head)
            if descriptor is not None:
                status = os.fstat(descriptor)
                self._spans.append((at, status.st_size, descriptor))
                at += status.st_size
                about = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
                identity.update(repr(about).encode())
        self.size: int | None = at
        self.key = identity.hexdigest()[:32]

    def read(self, at: int, length: int) -> bytes:
        """Up to ``length`` bytes from ``at`` on."""
        pieces: list[bytes] = []
        for start, size, content in self._spans:
            while length and start <= at < start + size:
                most = min(length, start + size - at)
                if isinstance(content, bytes):
                    piece = content[at - start :][:most]
                else:
                    piece = os.pread(content, most, at - start)
                if not piece:
                    raise UsageError("the file became shorter while it was read", "start again")
                pieces.append(piece)
                at += len(piece)
                length -= len(piece)
        return b"".join(pieces)


def is_ours(data: str) -> bool:
    """Whether a daemon of this data directory runs as whoever asks."""
    try:
        return os.stat(data).st_uid == os.geteuid()
    except OSError:
        return False


def send(croft: Croft, title: str, source: Source) -> str:
    """Sends what is not there yet; the SHA-256 of all of it, in hex."""
    from undercroft.cli.transfer import shown

    sending = _Sending(croft, source)
    if sending.done:
        croft.note("going on with what was begun")
    with shown(croft, title, source.size, sending.done) as count:
        for _ in count(sending.pieces()):
            pass
    return sending.digest.hexdigest()


class _Sending:
    """One file on its way."""

    def __init__(self, croft: Croft, source: Source) -> None:
        self._croft = croft
        self._source = source
        self._path = f"/v1/uploads/{quote(source.key)}"
        self.digest = hashlib.sha256()
        self._hashed = 0
        self.done = int(croft.api.get(self._path)["size"])
        if source.size is not None and self.done > source.size:
            croft.api.delete(self._path)
            self.done = 0

    def pieces(self) -> Iterator[bytes]:
        """Sends piece after piece, and gives each once it is there."""
        while self._hashed < self.done:
            self._hash(self._hashed, self._read(self._hashed, self.done - self._hashed))
        while piece := self._read(self.done, PIECE):
            before = self.done
            self._put(piece)
            # All of a piece counts, even where the daemon was away in the middle of it.
            while self.done < before + len(piece):
                self._put(piece[self.done - before :])
            self._hash(before, piece)
            yield piece
        if self.done == 0:
            raise UsageError("there is nothing in it", "choose another file")

    def _read(self, at: int, length: int) -> bytes:
        return self._source.read(at, min(length, PIECE))

    def _hash(self, at: int, piece: bytes) -> None:
        if at == self._hashed:
            self.digest.update(piece)
            self._hashed += len(piece)

    def _put(self, piece: bytes) -> None:
        """Sends a piece; if that is interrupted, finds out how much of it arrived."""
        start, deadline = self.done, time.monotonic() + _GONE
        while True:
            try:
                status = self._request(piece) if self.done == start else self._ask()
                self.done = int(status["size"])
                return
            except Exception as error:
                known = ours(error)
                if known is None or time.monotonic() > deadline:
                    raise
                if known.code == "wrong-state" and "size" in known.data:
                    size = int(known.data["size"])
                    if not start <= size <= start + len(piece):
                        raise
                    self.done = size
                    return
                if known.code not in ("daemon", "busy"):
                    raise
                time.sleep(0.2)

    def _request(self, piece: bytes) -> Any:
        import json

        response = self._croft.api.request(
            "PUT",
            self._path,
            params={"offset": self.done},
            headers={"content-type": "application/octet-stream"},
            body=piece,
            timeout=600.0,
        )
        return json.loads(response.read())

    def _ask(self) -> Any:
        return self._croft.api.get(self._path)
