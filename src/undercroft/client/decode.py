"""Typed objects from JSON, also when the server is newer and knows fields that we do not."""

from __future__ import annotations

import types
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from undercroft.model.errors import UnsupportedError

T = TypeVar("T")


def decode(data: bytes, kind: type[T]) -> T:
    """An object from JSON.

    Raises:
        UnsupportedError: it cannot be understood; the server is probably newer.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError:
        return convert(msgspec.json.decode(data), kind)
    except msgspec.DecodeError as error:
        raise _not_understood(error) from None


def convert(value: object, kind: type[T]) -> T:
    """An object from decoded JSON. Raises as `decode` does."""
    try:
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError:
            return msgspec.convert(_prune(value, kind), kind)
    except msgspec.ValidationError as error:
        raise _not_understood(error) from None


def _not_understood(error: Exception) -> UnsupportedError:
    return UnsupportedError(
        f"the daemon's answer cannot be understood: {error}",
        action="it is probably a newer Undercroft: upgrade this one",
    )


def _prune(value: object, kind: Any) -> object:
    """The value without the fields that the struct types within ``kind`` do not have."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        members = [member for member in arguments if member is not type(None)]
        return _prune(value, members[0]) if len(members) == 1 else value
    if isinstance(value, dict):
        if origin is dict:
            return {key: _prune(item, arguments[1]) for key, item in value.items()}
        if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
            hints = get_type_hints(kind)
            known = {field.encode_name: field.name for field in msgspec.structs.fields(kind)}
            return {
                key: _prune(item, hints[known[key]]) for key, item in value.items() if key in known
            }
    if isinstance(value, list) and origin in (tuple, list) and arguments:
        return [_prune(item, arguments[0]) for item in value]
    return value
