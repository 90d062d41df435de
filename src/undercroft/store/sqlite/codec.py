"""Records as JSON text, readable with any SQLite client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from undercroft.model.base import Record
from undercroft.model.errors import DataNewerError, InvalidError, UndercroftError
from undercroft.store.sqlite.failures import corrupt

R = TypeVar("R", bound=Record)


class Codec:
    """Turns records into text and back.

    Records evolve so: a field that is missing takes its default, so a new field needs one. A field
    unknown in a *spec* is refused (`DataNewerError`), because writing the record again would
    silently drop what a user asked for; elsewhere (status, meta) it is ignored, because it is
    measured anew. A version that adds to a spec or adds a kind adds a migration too, if only an
    empty one: then an older Undercroft refuses the file as a whole, with a clear message.
    """

    def __init__(self, path: Path, kinds: Mapping[str, type[Record]]) -> None:
        self._path = path
        self.kinds = dict(kinds)
        self._encoder = msgspec.json.Encoder()
        self._decoders: dict[str, msgspec.json.Decoder[Any]] = {}

    def kind(self, cls: type[Record]) -> str:
        """The name of a registered kind."""
        if self.kinds.get(cls.kind) is not cls:
            raise UndercroftError(f"{cls.__name__} is not one of the kinds that the store holds")
        return cls.kind

    def encode(self, record: Record) -> tuple[str, Record]:
        """The record as text, and as it will be read back.

        Reading back at once keeps out what JSON cannot carry: a NaN is written as null, and the
        record could not be read again.

        Raises:
            InvalidError: it would not be the same record.
        """
        kind = self.kind(type(record))
        try:
            text = self._encoder.encode(record).decode()
            return text, self._decoder(kind).decode(text)
        except (msgspec.MsgspecError, UnicodeError, TypeError, OverflowError) as error:
            raise InvalidError(
                f"{record.label} cannot be written down: {error}", object=record.label
            ) from error

    def decode(self, kind: str, id: str, text: str) -> Record:
        """The record from its text.

        Raises:
            DataNewerError: it has something that only a newer Undercroft knows.
            DataCorruptError: it is not such a record.
        """
        try:
            return self._decoder(kind).decode(text)  # type: ignore[no-any-return]
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise self._unreadable(kind, id, error) from error

    def decode_all(self, cls: type[R], rows: list[tuple[str, int, str]]) -> list[tuple[R, int]]:
        """Records and revisions from (id, revision, text); errors as for `decode`."""
        kind = self.kind(cls)
        decode = self._decoder(kind).decode
        id = ""
        try:
            return [(decode(text), revision) for id, revision, text in rows]
        except (msgspec.MsgspecError, UnicodeError):
            for id, _, text in rows:
                self.decode(kind, id, text)
            raise

    def _decoder(self, kind: str) -> msgspec.json.Decoder[Any]:
        decoder = self._decoders.get(kind)
        if decoder is None:
            cls = self.kinds.get(kind)
            if cls is None:
                raise DataNewerError(
                    f"{self._path} holds records of kind {kind!r}, which this version does not "
                    "know",
                    object=str(self._path),
                    action="use the newer Undercroft that wrote them",
                )
            decoder = self._decoders[kind] = msgspec.json.Decoder(cls)
        return decoder

    def _unreadable(self, kind: str, id: str, error: Exception) -> UndercroftError:
        if "contains unknown field" in str(error):
            return DataNewerError(
                f"{kind} {id} was written by a newer Undercroft: {error}",
                object=f"{kind} {id}",
                action="use the newer version again, or put back a backup from before the upgrade",
            )
        return corrupt(self._path, f"{kind} {id} cannot be read: {error}")
