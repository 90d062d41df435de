"""What all nouns of the client have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec

from undercroft.client.decode import convert, decode
from undercroft.client.raw import Raw, quote
from undercroft.model.base import Record

R = TypeVar("R", bound=Record)


class Versioned(NamedTuple, Generic[R]):
    """A record and the revision that last wrote it (its ETag)."""

    record: R
    revision: int


class Noun(Generic[R]):
    """Objects of one kind that can be read; ``ref`` is a name or an id."""

    def __init__(self, raw: Raw, path: str, kind: type[R]) -> None:
        self._raw = raw
        self._path = path
        self._kind = kind

    def get(self, ref: str) -> R:
        """The object."""
        return self.get_versioned(ref).record

    def get_versioned(self, ref: str) -> Versioned[R]:
        """The object, and the revision for ``if_match``."""
        response = self._raw.request("GET", self._url(ref))
        revision = response.headers.get("etag", "").strip('W/"')
        record = decode(response.read(), self._kind)
        return Versioned(record, int(revision) if revision.isdigit() else 0)

    def list(
        self,
        filter: str | None = None,
        sort: str | None = None,
        limit: int | None = None,
    ) -> Sequence[R]:
        """All objects that pass the filter (``status.state==running,meta.name~web*``), in the order
        of ``sort`` (``-meta.created``); at most ``limit``."""
        found: list[R] = []
        if limit is not None and limit <= 0:
            return found
        for item in self._raw.list(self._path, {"filter": filter, "sort": sort}):
            found.append(convert(item, self._kind))
            if len(found) == limit:
                break
        return found

    def _url(self, ref: str, rest: str = "") -> str:
        return f"{self._path}/{quote(ref)}{rest}"

    def _request(
        self,
        method: str,
        ref: str,
        rest: str = "",
        *,
        params: Mapping[str, object] | None = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> bytes:
        body = None
        if json is not None:
            body = msgspec.json.encode(json)
            headers = {"content-type": "application/json", **(headers or {})}
        return self._raw.request(
            method, self._url(ref, rest), params=params, headers=headers, body=body, timeout=timeout
        ).read()
