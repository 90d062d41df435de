"""Filter, sort, page and fields of listings. Pure: from records and text to records.

filter  ``status.state==running,meta.name~web*``: all conditions must hold. Operators are ``==``
        ``!=`` ``<`` ``<=`` ``>`` ``>=``, and ``~`` ``!~`` for shell patterns. A value with commas
        stands in double quotes. ``null`` is what is not there; sizes may be written ``1G``.
sort    ``-meta.created,meta.name``: ``-`` is descending; what is not there comes last.
cursor  Opaque; continues after the last item of a page, wherever that would be now. So a page
        neither repeats nor skips what others add and remove meanwhile.
fields  ``meta.name,status.state``: only these.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from undercroft.api.paths import Path, choices, is_number, parse_path
from undercroft.model.base import Record
from undercroft.model.errors import InvalidError
from undercroft.model.requests import Page
from undercroft.model.units import parse_size
from undercroft.store.interface import Listing, Versioned

R = TypeVar("R", bound=Record)

DEFAULT_LIMIT = 100
MAX_LIMIT = 1000
MAX_TEXT = 4096
MAX_CONDITIONS = 32
MAX_FIELDS = 64
_CONDITION = re.compile(r"([^=!<>~\s\"]+)\s*(==|!=|<=|>=|!~|<|>|~)\s*(.*)", re.DOTALL)
_NUMBER = re.compile(r"-?[0-9]{1,18}(?:\.[0-9]{1,9})?(?:e-?[0-9]{1,2})?")
Test = Callable[[Any], bool]
Order = Callable[[Record], Any]


@dataclass(frozen=True, slots=True)
class Query:
    """What a caller wants of a listing."""

    filter: str | None = None
    sort: str | None = None
    limit: int | None = None
    cursor: str | None = None
    fields: str | None = None


def run_query(kind: type[R], listing: Listing[R], query: Query) -> Page:
    """The page of a listing that the query describes.

    Raises:
        InvalidError: part of the query makes no sense; the message says which.
    """
    limit = DEFAULT_LIMIT if query.limit is None else query.limit
    if not 1 <= limit <= MAX_LIMIT:
        raise InvalidError(f"limit {limit} is not possible", action=f"choose 1 to {MAX_LIMIT}")
    test = parse_filter(kind, query.filter)
    order = parse_sort(kind, query.sort)
    project = parse_fields(kind, query.fields)
    digest = _digest(kind, query)
    items: Sequence[Versioned[R]] = listing.items
    if test is not None:
        items = [item for item in items if test(item.record)]
    if order is not None:
        items = sorted(items, key=lambda item: order(item.record))
    if query.cursor is not None:
        items = _after(items, order, _read_cursor(query.cursor, digest))
    following = None
    if len(items) > limit:
        items = items[:limit]
        following = _write_cursor(digest, items[-1].record, order)
    records: list[Any] = [item.record for item in items]
    if project is not None:
        records = [project(record) for record in records]
    return Page(items=records, revision=listing.revision, next=following)


# filter


def parse_filter(kind: type[Record], text: str | None) -> Test | None:
    """A test from a filter; None if everything passes.

    Raises:
        InvalidError: a condition, a path or a value makes no sense.
    """
    if text is None or not text.strip():
        return None
    tests = [_condition(kind, part) for part in _split(text, "filter")]
    if len(tests) == 1:
        return tests[0]
    return lambda record: all(test(record) for test in tests)


def _split(text: str, what: str) -> list[str]:
    """The parts between commas that do not stand in double quotes."""
    if len(text) > MAX_TEXT:
        raise InvalidError(f"the {what} is longer than {MAX_TEXT} characters")
    parts, start, quoted = [], 0, False
    for index, character in enumerate(text):
        if character == '"':
            quoted = not quoted
        elif character == "," and not quoted:
            parts.append(text[start:index])
            start = index + 1
    if quoted:
        raise InvalidError(f"a quotation mark is missing in the {what} {text[start:][:60]!r}")
    parts.append(text[start:])
    if len(parts) > MAX_CONDITIONS:
        raise InvalidError(f"the {what} has more than {MAX_CONDITIONS} parts")
    return parts


def _condition(kind: type[Record], text: str) -> Test:
    match = _CONDITION.fullmatch(text.strip())
    if match is None:
        raise InvalidError(
            f"{text.strip()[:60]!r} is not a condition",
            action="write PATH==VALUE, with ==, !=, <, <=, >, >=, ~ or !~",
        )
    path = parse_path(kind, match.group(1))
    compare = _comparison(path, match.group(2), match.group(3))
    negative = match.group(2) in ("!=", "!~")
    if path.many:
        # A list passes if one of its members does; != and !~ want all members to differ.
        several = all if negative else any
        return lambda record: several(compare(value) for value in path.values(record))
    return lambda record: compare(path.value(record))


def _comparison(path: Path, operator: str, text: str) -> Test:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = text[1:-1]
    elif '"' in text:
        raise InvalidError(f"the value {text[:60]!r} of {path.text} is only partly quoted")
    elif text == "null" and operator in ("==", "!="):
        nothing = operator == "=="
        return lambda value: (value is None) is nothing
    if operator in ("~", "!~"):
        matches = re.compile(fnmatch.translate(text)).match
        wanted = operator == "~"
        return lambda value: (value is not None and matches(_text(value)) is not None) is wanted
    wanted_value = _operand(path, operator, text)
    if operator == "==":
        return lambda value: _same(value, wanted_value)
    if operator == "!=":
        return lambda value: not _same(value, wanted_value)
    test = _ORDERED[operator]
    number = isinstance(wanted_value, (int, float))

    def ordered(value: Any) -> bool:
        if value is None:
            return False
        if number:
            return isinstance(value, (int, float)) and test(value, wanted_value)
        return test(_text(value), wanted_value)

    return ordered


_ORDERED: dict[str, Callable[[Any, Any], bool]] = {
    "<": lambda value, wanted: bool(value < wanted),
    "<=": lambda value, wanted: bool(value <= wanted),
    ">": lambda value, wanted: bool(value > wanted),
    ">=": lambda value, wanted: bool(value >= wanted),
}


def _operand(path: Path, operator: str, text: str) -> Any:
    """The value to compare with, in the type of what the path leads to."""
    leaf = path.leaf
    if is_number(leaf):
        return _number(path, text)
    if leaf is bool:
        if text not in ("true", "false") or operator not in ("==", "!="):
            raise InvalidError(f"{path.text} is true or false, not {text[:60]!r}")
        return text == "true"
    allowed = choices(leaf)
    if allowed is not None and operator in ("==", "!=") and text not in allowed:
        raise InvalidError(
            f"{path.text} is never {text[:60]!r}", action=f"choose one of {', '.join(allowed)}"
        )
    if leaf is Any and operator in _ORDERED and _NUMBER.fullmatch(text):
        return float(text)
    return text


def _number(path: Path, text: str) -> int | float:
    if _NUMBER.fullmatch(text):
        return float(text) if "." in text or "e" in text else int(text)
    try:
        return parse_size(text)
    except InvalidError:
        raise InvalidError(f"{path.text} is a number, not {text[:60]!r}") from None


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, str):
        return value is not None and _text(value) == wanted
    return type(value) in (type(wanted), int, float) and bool(value == wanted)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return str(value)
    return msgspec.json.encode(value).decode()


# sort


class _Descending:
    """Turns the order of a key around."""

    __slots__ = ("key",)

    def __init__(self, key: tuple[int, Any]) -> None:
        self.key = key

    def __lt__(self, other: _Descending) -> bool:
        return other.key < self.key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Descending) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


def parse_sort(kind: type[Record], text: str | None) -> Order | None:
    """A key from a sort order, with the id last so that no two are equal; None: by id.

    Raises:
        InvalidError: a path does not exist, or leads to lists.
    """
    keys = _sort_keys(kind, text)
    if not keys:
        return None

    def order(record: Record) -> Any:
        return _key([path.value(record) for path, _ in keys], keys, record.meta.id)

    order.keys = keys  # type: ignore[attr-defined]
    return order


def _sort_keys(kind: type[Record], text: str | None) -> list[tuple[Path, bool]]:
    if text is None or not text.strip():
        return []
    keys: list[tuple[Path, bool]] = []
    for part in _split(text, "sort order"):
        name = part.strip()
        descending = name.startswith("-")
        path = parse_path(kind, name[1:] if descending else name)
        if path.many:
            raise InvalidError(f"{path.text} is a list, it gives no order")
        keys.append((path, descending))
    return keys


def _key(values: Sequence[Any], keys: Sequence[tuple[Path, bool]], id: str) -> tuple[Any, ...]:
    parts: list[Any] = []
    for value, (_, descending) in zip(values, keys, strict=True):
        if value is None:
            parts.append((1, None, None))
        else:
            part = _rank(value)
            parts.append((0, 0, _Descending(part) if descending else part))
    return (*parts, id)


def _rank(value: Any) -> tuple[int, Any]:
    """Makes values of different types comparable."""
    if isinstance(value, (int, float)):
        return (0, int(value) if isinstance(value, bool) else value)
    return (1, _text(value))


# cursor


def _digest(kind: type[Record], query: Query) -> str:
    text = "\0".join((kind.kind, query.sort or "", query.filter or ""))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def _write_cursor(digest: str, record: Record, order: Order | None) -> str:
    keys: list[tuple[Path, bool]] = getattr(order, "keys", [])
    values = [path.value(record) for path, _ in keys]
    plain = [None if value is None else _rank(value)[1] for value in values]
    data = msgspec.json.encode([digest, plain, record.meta.id])
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _read_cursor(text: str, digest: str) -> tuple[list[Any], str]:
    wrong = InvalidError("the cursor is not one of this API's", action="begin without a cursor")
    if len(text) > 2 * MAX_TEXT or not text.isascii():
        raise wrong
    try:
        data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        found, values, id = msgspec.json.decode(
            data, type=tuple[str, list[int | float | str | None], str]
        )
    except (msgspec.MsgspecError, binascii.Error, ValueError):
        raise wrong from None
    if found != digest:
        raise InvalidError(
            "the cursor belongs to a listing with another filter or sort order",
            action="begin without a cursor",
        )
    return values, id


def _after(
    items: Sequence[Versioned[R]], order: Order | None, position: tuple[list[Any], str]
) -> Sequence[Versioned[R]]:
    """Those behind the position, found by halving."""
    values, id = position
    keys: list[tuple[Path, bool]] = getattr(order, "keys", [])
    if len(values) != len(keys):
        raise InvalidError("the cursor is not one of this API's", action="begin without a cursor")
    mark: Any = _key(values, keys, id)
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        record = items[middle].record
        key = (record.meta.id,) if order is None else order(record)
        if mark < key:
            high = middle
        else:
            low = middle + 1
    return items[low:]


# fields

_Tree = dict[str, Any]


def parse_fields(kind: type[Record], text: str | None) -> Callable[[Record], Any] | None:
    """A function that keeps only some fields of a record; None: keeps everything.

    Raises:
        InvalidError: a path does not exist.
    """
    if text is None or not text.strip():
        return None
    parts = text.split(",")
    if len(text) > MAX_TEXT or len(parts) > MAX_FIELDS:
        raise InvalidError(f"more than {MAX_FIELDS} fields are not possible")
    tree: _Tree = {}
    for part in parts:
        path = parse_path(kind, part.strip())
        node = tree
        for name in path.parts[:-1]:
            node = node.setdefault(name, {})
            if node is _ALL:
                break
        else:
            node[path.parts[-1]] = _ALL
    return _projection(tree)


_ALL: _Tree = {}


def _projection(tree: _Tree) -> Callable[[Any], Any]:
    leaves = [name for name, below in tree.items() if below is _ALL]
    inner = [(name, _projection(below)) for name, below in tree.items() if below is not _ALL]

    def project(value: Any) -> Any:
        if isinstance(value, msgspec.Struct):
            found = {name: getattr(value, name) for name in leaves}
            for name, below in inner:
                found[name] = below(getattr(value, name))
            return found
        if isinstance(value, dict):
            found = {name: value[name] for name in leaves if name in value}
            for name, below in inner:
                if name in value:
                    found[name] = below(value[name])
            return found
        if isinstance(value, (list, tuple)):
            return [project(item) for item in value]
        return value

    return project
