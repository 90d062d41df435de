"""Archives, as of POSIX.1-1988 (ustar) with large sizes in GNU's way: what OVA files are.

Reading is strict: a plain file is a plain file, its name is a name and no path, and what a header
claims has to lie in the file. Nothing is ever written by the name that a member has.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from undercroft.model.errors import HostileImageError

__all__ = [
    "BLOCK",
    "Member",
    "header",
    "is_tar",
    "long_header",
    "padding",
    "plain_name",
    "read_members",
    "refused",
]

BLOCK = 512
_MOST_MEMBERS = 1000
_MOST_EXTRA = 64 << 10  # bytes of a long name or of attributes
_PLAIN = (b"0", b"\0", b"7")
_LARGEST = 0o77777777777


@dataclass(frozen=True)
class Member:
    """A file in an archive: ``size`` bytes from ``offset`` on."""

    name: str
    offset: int
    size: int


def refused(reason: str) -> HostileImageError:
    """The error for a package that is not taken."""
    return HostileImageError(
        f"the package is refused: {reason}",
        action="get it again from a source you trust, or have it exported anew",
    )


def header(name: str, size: int, mtime: int = 0) -> bytes:
    """The header of a plain file. ``name`` is ASCII of at most 100 characters."""
    length = b"%011o\0" % size if size <= _LARGEST else b"\x80" + size.to_bytes(11, "big")
    block = bytearray(
        struct.pack(
            "100s8s8s8s12s12s8s1s100s6s2s32s32s8s8s155s12x", name.encode("ascii"), b"0000644\0",
            b"0000000\0", b"0000000\0", length, b"%011o\0" % mtime, b" " * 8, b"0", b"",
            b"ustar\0", b"00", b"undercroft", b"undercroft", b"0000000\0", b"0000000\0", b"",
        )
    )  # fmt: skip
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def long_header(name: str, size: int) -> bytes:
    """The header of a plain file whose name is not ASCII, or longer than 100 characters: GNU's way,
    the name in a file of its own in front."""
    text = name.encode() + b"\0"
    block = bytearray(header("././@LongLink", len(text)))
    block[156:157] = b"L"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + text + bytes(padding(len(text))) + header("long", size)


def padding(size: int) -> int:
    """Bytes that follow a file of that size, up to the next header."""
    return -size % BLOCK


def is_tar(head: bytes) -> bool:
    """Whether a file that begins like this is an archive."""
    return len(head) >= BLOCK and head[257:262] == b"ustar"


def read_members(fd: int, size: int) -> list[Member]:
    """The files in an archive of ``size`` bytes.

    Raises:
        HostileImageError: it is damaged or truncated, or has anything but plain files with plain
            names, each once.
    """
    members: dict[str, Member] = {}
    for member in _read(fd, size):
        if member.name in members:
            raise refused(f"it has {member.name[:80]!r} twice")
        if len(members) >= _MOST_MEMBERS:
            raise refused(f"it has more than {_MOST_MEMBERS} files")
        members[member.name] = member
    if not members:
        raise refused("the archive is empty")
    return list(members.values())


def _read(fd: int, size: int) -> Iterator[Member]:
    at = 0
    long_name: str | None = None
    long_size: int | None = None
    ended = False
    extras = 0
    while at + BLOCK <= size:
        block = os.pread(fd, BLOCK, at)
        at += BLOCK
        if block == bytes(BLOCK):
            ended = True
            break
        kind, length = _check(block)
        if kind in (b"x", b"g", b"L"):
            extras += 1
            if length > _MOST_EXTRA or at + length > size or extras > 3 * _MOST_MEMBERS:
                raise refused("the attributes of a file are too large")
            content = os.pread(fd, length, at)
            at += length + padding(length)
            if kind == b"x":
                long_name, long_size = _attributes(content, long_name)
            elif kind == b"L":
                long_name = _text(content.partition(b"\0")[0])
            continue
        if kind == b"5":  # a directory says nothing
            long_name = long_size = None
            continue
        if kind not in _PLAIN:
            raise refused("it has links, devices or the like in it")
        prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
        own = block[:100].partition(b"\0")[0]
        name = long_name or _text(prefix + b"/" + own if prefix else own)
        length = long_size if long_size is not None else length
        if at + length > size:
            raise refused(f"it ends in the middle of {name[:80]!r} (is it truncated?)")
        yield Member(plain_name(name), at, length)
        at += length + padding(length)
        long_name = long_size = None
    if not ended and at < size:
        raise refused("it ends in the middle of a header (is it truncated?)")


def _check(block: bytes) -> tuple[bytes, int]:
    """Type and size of what a header is for."""
    stated = _number(block[148:156])
    if stated != sum(block[:148]) + sum(block[156:]) + 8 * 32:
        raise refused("the archive is damaged: a header's checksum is wrong")
    return block[156:157], _number(block[124:136])


def _number(field: bytes) -> int:
    if field[:1] == b"\x80":
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise refused("the archive is damaged: a header makes no sense")
    return number


def _attributes(content: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Name and size from a pax header: records ``LENGTH KEY=VALUE\\n``."""
    size: int | None = None
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or len(digits) > 6 or not 0 < int(digits) <= len(content):
            raise refused("the attributes of a file are damaged")
        record, content = content[len(digits) + 1 : int(digits)], content[int(digits) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        if key == b"path":
            name = _text(value)
        elif key == b"size":
            if not value.isdigit() or len(value) > 18:
                raise refused("the attributes of a file are damaged")
            size = int(value)
        elif key.startswith(b"GNU.sparse"):
            raise refused("it has sparse files in it, which a package cannot have")
    return name, size


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise refused("the name of a file is not text") from None


def plain_name(name: str) -> str:
    """The name itself, if it is one and not a path that leads anywhere.

    Raises:
        HostileImageError: it is.
    """
    name = name.removeprefix("./")
    if not name or len(name) > 255 or not name.isprintable() or name in (".", ".."):
        raise refused(f"{name[:80]!r} is not the name of a file")
    if "/" in name or "\\" in name:
        raise refused(
            f"{name[:80]!r} lies in a directory: a package has all its files side by side"
        )
    return name
