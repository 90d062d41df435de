"""Dotted paths into records, such as ``status.state`` or ``meta.labels.env``.

A path is checked against the type of the record, so that a misspelt one is refused instead of
finding nothing.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import lru_cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgspec

from undercroft.model.errors import InvalidError

MAX_PATH = 200
MAX_DEPTH = 12


class Path:
    """A path that exists in records of one type.

    ``leaf`` is the type of what it leads to, without ``None``; `Any` where only the record knows.
    ``many``: it leads through a list, so that there may be several values.
    """

    __slots__ = ("_steps", "leaf", "many", "parts", "text")

    def __init__(
        self,
        text: str,
        parts: tuple[str, ...],
        steps: tuple[Callable[[Any], Any], ...],
        leaf: Any,
        many: bool,
    ) -> None:
        self.text = text
        self.parts = parts
        self.leaf = leaf
        self.many = many
        self._steps = steps

    def value(self, record: object) -> Any:
        """What is there; None where there is nothing. For paths that are not ``many``."""
        value: Any = record
        for step in self._steps:
            if value is None:
                return None
            value = step(value)
        return value

    def values(self, record: object) -> Iterator[Any]:
        """All that is there, with lists taken apart; a single None where there is nothing."""
        found = list(_spread([record], self._steps))
        yield from found or [None]


def _spread(values: list[Any], steps: tuple[Callable[[Any], Any], ...]) -> Iterator[Any]:
    for step in steps:
        values = [step(value) for value in _flat(values)]
    yield from _flat(values)


def _flat(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from value
        elif value is not None:
            yield value


@lru_cache(maxsize=1024)
def parse_path(kind: type, text: str) -> Path:
    """The path with this text in records of type ``kind``.

    Raises:
        InvalidError: there is no such path.
    """
    if not text or len(text) > MAX_PATH:
        raise InvalidError(f"{text[:60]!r} is not a path to a field", action="such as status.state")
    parts: list[str] = []
    steps: list[Callable[[Any], Any]] = []
    here: Any = kind
    many = False
    rest = text
    while rest:
        here, listed = _element(here)
        many = many or listed
        if _is_struct(here):
            name, _, rest = rest.partition(".")
            hints = _fields(here)
            if name not in hints:
                known = ", ".join(sorted(hints))
                raise InvalidError(
                    f"there is no {name[:60]!r} in {'.'.join(parts) or 'the object'}",
                    action=f"choose one of {known}",
                )
            steps.append(_attribute(name))
            here = hints[name]
        elif get_origin(here) is dict:
            name, rest = rest, ""  # keys (of labels) may contain dots themselves
            steps.append(_key(name))
            here = get_args(here)[1]
        elif here is Any and len(parts) < MAX_DEPTH:
            name, _, rest = rest.partition(".")
            steps.append(_key(name))
        else:
            raise InvalidError(f"{'.'.join(parts)} has no parts, so no {rest[:60]!r}")
        parts.append(name)
    leaf, listed = _element(here)
    return Path(text, tuple(parts), tuple(steps), leaf, many or listed)


def _attribute(name: str) -> Callable[[Any], Any]:
    def step(value: Any) -> Any:
        return getattr(value, name, None)

    return step


def _key(name: str) -> Callable[[Any], Any]:
    def step(value: Any) -> Any:
        return value.get(name) if isinstance(value, Mapping) else None

    return step


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


@lru_cache(maxsize=128)
def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {name: hints[name] for name in kind.__struct_fields__}


def _element(kind: Any) -> tuple[Any, bool]:
    """The type inside of ``X | None`` and of lists, and whether there was a list."""
    listed = False
    while True:
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            members = [member for member in get_args(kind) if member is not type(None)]
            if len(members) != 1:
                return Any, listed
            kind = members[0]
        elif origin in (tuple, list, Sequence):
            kind, listed = get_args(kind)[0], True
        else:
            return kind, listed


def is_number(kind: Any) -> bool:
    """Whether values of the type are numbers (bool is none)."""
    return kind in (int, float)


def choices(kind: Any) -> tuple[str, ...] | None:
    """The values of an enumeration."""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return tuple(str(member.value) for member in kind)
    return None
