"""Tokens for callers over TCP: DATA/tokens.json, mode 0600, changed by `croft token`.

A token is 256 random bits, of which only the SHA-256 is kept: there is nothing to guess that a slow
hash would protect, and every request checks one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from undercroft.model.base import Model
from undercroft.model.errors import (
    AlreadyExistsError,
    DataCorruptError,
    DataError,
    InvalidError,
    NoSpaceError,
    NotFoundError,
    UndercroftError,
)
from undercroft.model.names import check_name
from undercroft.operations.access import ALL, PRIVILEGES, Caller

PREFIX = "croft_"
LAYOUT = 1
MAX_TOKENS = 1000


class Token(Model, frozen=True, kw_only=True):
    """A token without its secret. ``hash`` is the SHA-256 of the whole text, in hex; ``created`` in
    seconds since 1970."""

    name: str
    hash: str
    privileges: tuple[str, ...]
    created: float


class _File(Model, frozen=True, kw_only=True):
    layout: int = LAYOUT
    tokens: tuple[Token, ...] = ()


class TokenFile:
    """The tokens of a data directory. Read anew whenever the file has changed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._callers: list[tuple[bytes, Caller]] = []

    def caller(self, token: bytes) -> Caller | None:
        """Whose token it is; None: nobody's. Takes as long whichever it is.

        Raises:
            DataCorruptError: the file is damaged.
        """
        self._refresh()
        digest = hashlib.sha256(token).hexdigest().encode()
        found = None
        for known, caller in self._callers:
            if hmac.compare_digest(known, digest):
                found = caller
        return found

    def list(self) -> tuple[Token, ...]:
        """All tokens, without their secrets."""
        return self._read().tokens

    def create(self, name: str, privileges: Iterable[str] = (ALL,)) -> str:
        """A new token; its text is returned here and never again.

        Raises:
            AlreadyExistsError: the name is taken.
            InvalidError: the name, or a privilege, makes no sense.
            DataError, NoSpaceError: it cannot be written.
        """
        check_name(name, "token")
        wanted = tuple(dict.fromkeys(privileges))
        unknown = [text for text in wanted if text != ALL and text not in PRIVILEGES]
        if unknown or not wanted:
            raise InvalidError(
                f"{unknown[0][:60]!r} is not a privilege" if unknown else "no privilege was named",
                action=f"choose of {', '.join(sorted(PRIVILEGES))}, or {ALL} for all",
            )
        text = PREFIX + secrets.token_urlsafe(32)
        token = Token(
            name=name,
            hash=hashlib.sha256(text.encode()).hexdigest(),
            privileges=wanted,
            created=time.time(),
        )
        with self._locked():
            tokens = self._read().tokens
            if any(other.name == name for other in tokens):
                raise AlreadyExistsError(
                    f"token {name} already exists",
                    object=f"token {name}",
                    action=f"choose another name, or remove it: croft token rm {name}",
                )
            if len(tokens) >= MAX_TOKENS:
                raise InvalidError(f"there are {MAX_TOKENS} tokens already", action="remove some")
            self._write(_File(tokens=(*tokens, token)))
        return text

    def remove(self, name: str) -> None:
        """Makes a token invalid, at once.

        Raises:
            NotFoundError: there is none of this name.
        """
        with self._locked():
            tokens = self._read().tokens
            left = tuple(token for token in tokens if token.name != name)
            if len(left) == len(tokens):
                raise NotFoundError(
                    f"token {name[:80]} not found",
                    object=f"token {name[:80]}",
                    action="see what exists with: croft token ls",
                )
            self._write(_File(tokens=left))

    def _refresh(self) -> None:
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            self._seen, self._callers = None, []
            return
        seen = (status.st_mtime_ns, status.st_ino, status.st_size)
        if seen != self._seen:
            self._callers = [
                (token.hash.encode(), Caller(f"token {token.name}", frozenset(token.privileges)))
                for token in self._read().tokens
            ]
            self._seen = seen

    def _read(self) -> _File:
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return _File()
        except OSError as error:
            raise self._failed(error) from None
        try:
            found = msgspec.json.decode(data, type=_File)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise DataCorruptError(
                f"{self.path} is damaged: {error}",
                object=str(self.path),
                action="move it away, and make the tokens anew with: croft token create NAME",
            ) from None
        if found.layout != LAYOUT:
            raise DataCorruptError(
                f"{self.path} has layout {found.layout}, which is not known", object=str(self.path)
            )
        return found

    def _write(self, content: _File) -> None:
        """Replaces the file as a whole: whoever reads it sees the old one or the new one."""
        half = self.path.with_name(f".{self.path.name}.{secrets.token_hex(8)}")
        try:
            fd = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                with os.fdopen(fd, "wb") as file:
                    file.write(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(half, self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    half.unlink()
                raise
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise self._failed(error) from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time: the directory itself is what is locked."""
        try:
            fd = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise self._failed(error) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _failed(self, error: OSError) -> UndercroftError:
        import errno

        kind = NoSpaceError if error.errno in (errno.ENOSPC, errno.EDQUOT) else DataError
        return kind(
            f"{self.path} cannot be used: {error.strerror}",
            object=str(self.path),
            action="tokens belong to whoever runs the daemon: try as that user",
        )
