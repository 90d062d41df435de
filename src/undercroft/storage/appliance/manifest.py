"""Manifests: checksums of the files of a package (DSP0243, section 6.1)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping

from undercroft.model.errors import ChecksumError
from undercroft.storage.appliance.tar import Member, refused
from undercroft.storage.threads import Stop

__all__ = ["MAX_MANIFEST", "Checksums", "read_manifest", "verify", "write_manifest"]

MAX_MANIFEST = 1 << 20
_LINE = re.compile(r"\s*(SHA1|SHA256|SHA512)\s*\((.{1,255})\)\s*=\s*([0-9a-fA-F]{40,128})\s*")
_DIGITS = {"SHA1": 40, "SHA256": 64, "SHA512": 128}
_CHUNK = 1 << 20

Checksums = dict[str, tuple[str, str]]
"""By name: the algorithm as hashlib calls it, and the checksum in hex."""


def read_manifest(text: bytes) -> Checksums:
    """What a manifest says.

    Raises:
        HostileImageError: it is malformed.
    """
    found: Checksums = {}
    for line in text.decode("utf-8", "replace").splitlines():
        if not line.strip():
            continue
        match = _LINE.fullmatch(line)
        if match is None or len(match[3]) != _DIGITS[match[1]]:
            raise refused(f"its manifest makes no sense: {line[:80]!r}")
        if match[2] in found:
            raise refused(f"its manifest has {match[2][:80]!r} twice")
        found[match[2]] = (match[1].lower(), match[3].lower())
    if not found:
        raise refused("its manifest is empty")
    return found


def write_manifest(checksums: Mapping[str, str]) -> bytes:
    """A manifest of SHA-256 checksums, in the order given."""
    return "".join(f"SHA256({name})= {sum}\n" for name, sum in checksums.items()).encode()


def verify(
    fd: int,
    size: int,
    whole: str | None,
    members: Mapping[str, Member],
    checksums: Checksums,
    stop: Stop,
    report: Callable[[float], None] = lambda fraction: None,
) -> None:
    """Compares the file with its SHA-256 (``whole``, None: not known), and the members with theirs.
    Each byte is read once. Blocks.

    Raises:
        ChecksumError: something is not what was announced.
    """
    all_of_it = hashlib.sha256()
    done = 0
    spans = sorted(
        (members[name].offset, members[name].size, name, *checksums[name])
        for name in checksums
        if name in members
    )
    places = [*spans, (size, 0, "", "sha1", "")]
    for offset, length, name, algorithm, expected in places:
        if whole is not None:
            for piece in _pieces(fd, done, offset - done, stop):
                all_of_it.update(piece)
        done = offset
        # Not for secrecy: it is what the file format prescribes.
        digest = hashlib.new(algorithm, usedforsecurity=False)
        for piece in _pieces(fd, offset, length, stop):
            digest.update(piece)
            if whole is not None:
                all_of_it.update(piece)
            done += len(piece)
            report(done / max(size, 1))
        if name and digest.hexdigest() != expected:
            raise ChecksumError(
                f"{name} is not what the manifest says: its {algorithm.upper()} is "
                f"{digest.hexdigest()}, not {expected}",
                object=name,
                action="get the package again; if it was changed on purpose, leave its manifest "
                "out",
            )
    if whole is not None and all_of_it.hexdigest() != whole.lower():
        raise ChecksumError(
            f"the file has SHA-256 {all_of_it.hexdigest()}, not the announced {whole}",
            action="get it again, and check where the announced value comes from",
        )


def _pieces(fd: int, start: int, length: int, stop: Stop) -> Iterator[bytes]:
    at, end = start, start + length
    while at < end:
        stop.check()
        piece = os.pread(fd, min(_CHUNK, end - at), at)
        if not piece:
            raise refused("it became shorter while it was read")
        yield piece
        at += len(piece)
