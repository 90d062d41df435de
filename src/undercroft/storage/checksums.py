"""Checksums, and the lists of them that distributions publish beside their images.

    <hash>  <file>            coreutils, in text mode; a ``*`` before the name: binary mode
    SHA256 (<file>) = <hash>  BSD, and ``sha256sum --tag``
    <hash>                    a file of its own beside the image

Comments (``#``) and the armour of an OpenPGP signature around the list are passed over. Only
SHA-256 and SHA-512 count: whatever else is listed is too weak to be relied upon.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from undercroft.model.errors import FetchError, InvalidError

__all__ = ["Checksum", "checksum_in"]

_LONGEST = 4096  # characters of a line
_LENGTHS = {64: "sha256", 128: "sha512"}  # hex digits
_HEX = "[0-9A-Fa-f]{64}(?:[0-9A-Fa-f]{64})?"
_CHECKSUM = re.compile(rf"(?:(sha256|sha512):)?({_HEX})", re.IGNORECASE)
_PLAIN = re.compile(rf"\\?({_HEX})(?:[ \t]+\*?(\S.*))?")
_TAGGED = re.compile(rf"(?:SHA256|SHA512)[ \t]*\((.+)\)[ \t]*=[ \t]*({_HEX})", re.IGNORECASE)


@dataclass(frozen=True)
class Checksum:
    """An algorithm (``sha256`` or ``sha512``) and the value in lower-case hex."""

    algorithm: str
    value: str

    @classmethod
    def parse(cls, text: str) -> Checksum:
        """From ``sha256:<hex>``, ``sha512:<hex>``, or the bare digits of either.

        Raises:
            InvalidError: neither.
        """
        match = _CHECKSUM.fullmatch(text.strip())
        algorithm = _LENGTHS[len(match.group(2))] if match else ""
        if match is None or (match.group(1) or algorithm).lower() != algorithm:
            raise InvalidError(
                f"{text[:80]!r} is not a checksum",
                action="give 64 hexadecimal digits (SHA-256) or 128 (SHA-512)",
            )
        return cls(algorithm, match.group(2).lower())

    def __str__(self) -> str:
        return f"{self.algorithm}:{self.value}"


def checksum_in(text: str, file: str, source: str) -> Checksum:
    """The checksum of a file out of a list; the longer one if it is there twice.

    A list whose own name (the last part of ``source``, its address) begins with that of the file
    is about nothing else: then its only entry counts, whatever name that has. ``latest`` names are
    published like that.

    Raises:
        FetchError: the file is not listed, or with two different values.
    """
    entries = list(_entries(text))
    found = {value for name, value in entries if _base(name) == file}
    if not found and _base(source).startswith(file) and len({value for _, value in entries}) == 1:
        found = {value for _, value in entries}
    longest = max(map(len, found), default=0)
    values = {value for value in found if len(value) == longest}
    if len(values) != 1:
        reason = "says two things about" if values else "does not list"
        raise FetchError(
            f"{source} {reason} {file}",
            object=source,
            action="look at it there; a moved image needs another entry in the catalogue",
        )
    return Checksum(_LENGTHS[longest], values.pop())


def _entries(text: str) -> list[tuple[str, str]]:
    """Name (perhaps empty) and value in lower case of every line that is an entry."""
    entries = []
    for line in map(str.strip, text.splitlines()):
        if len(line) > _LONGEST:
            continue
        if match := _TAGGED.fullmatch(line):
            entries.append((match.group(1), match.group(2).lower()))
        elif match := _PLAIN.fullmatch(line):
            entries.append((match.group(2) or "", match.group(1).lower()))
    return entries


def _base(name: str) -> str:
    return name.rpartition("/")[2]
