"""Names that people give, and identifiers that Undercroft gives."""

from __future__ import annotations

import re
import secrets

from undercroft.model.errors import InvalidError

_NAME = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_IMAGE_NAME = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?(?::[a-z0-9][a-z0-9._-]{0,62})?")
_LABEL_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_ID = re.compile(r"[a-z]{2,8}-[0-9a-hjkmnp-tv-z]{16}")
_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford's base 32: no i, l, o, u

PREFIX = {
    "vm": "vm",
    "volume": "vol",
    "layer": "layer",
    "snapshot": "snap",
    "template": "tpl",
    "checkpoint": "ckpt",
    "backup": "bk",
    "repository": "repo",
    "image": "img",
    "export": "exp",
    "task": "task",
    "event": "ev",
    "datastore": "ds",
    "host": "host",
}


def new_id(kind: str) -> str:
    """A fresh identifier such as ``vm-3f9k…`` with 80 random bits; never given twice."""
    number = secrets.randbits(80)
    text = "".join(_ALPHABET[(number >> shift) & 31] for shift in range(75, -1, -5))
    return f"{PREFIX[kind]}-{text}"


def is_id(text: str) -> bool:
    """Whether the text has the form of an identifier."""
    return _ID.fullmatch(text) is not None


def check_name(name: str, kind: str = "vm") -> str:
    """Returns a valid name unchanged.

    A name is usable as a DNS host name (RFC 1123): lower-case letters, digits, ``-`` and ``.``,
    at most 63 characters. An image's name may carry a tag, as in ``debian:12``. A name cannot
    look like an identifier, so that either can be given anywhere.

    Raises:
        InvalidError: not a valid name.
    """
    pattern = _IMAGE_NAME if kind == "image" else _NAME
    if pattern.fullmatch(name) is None or ".." in name:
        raise InvalidError(
            f"{name[:80]!r} is not a valid name for a {kind}",
            action="use 1 to 63 lower-case letters, digits, '-' and '.', "
            "beginning and ending with a letter or digit",
        )
    if is_id(name):
        raise InvalidError(
            f"{name!r} looks like an identifier, so it cannot be a name", action="choose another"
        )
    return name


def check_labels(labels: dict[str, str]) -> dict[str, str]:
    """Returns valid labels unchanged: at most 64, keys and values at most 63 and 255 characters.

    Raises:
        InvalidError: too many, or a key or value that is not allowed.
    """
    if len(labels) > 64:
        raise InvalidError(f"{len(labels)} labels are too many", action="give at most 64")
    for key, value in labels.items():
        if _LABEL_KEY.fullmatch(key) is None:
            raise InvalidError(f"{key[:80]!r} is not a valid label key")
        if len(value) > 255 or not value.isprintable():
            raise InvalidError(f"the value of label {key!r} is too long or not printable")
    return labels


def new_mac() -> str:
    """A random unicast MAC address, locally administered, in QEMU's usual 52:54:00 range."""
    return "52:54:00:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))
