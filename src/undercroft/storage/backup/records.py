"""The records that packs and archives consist of.

A record is a header of 52 bytes and what it announces. Integers are little-endian::

    0   4  "UCP1"
    4   1  kind: 1 chunk of a disk or file, 2 map, 3 manifest
    5   1  codec: 0 as it is, 1 one zstd frame (RFC 8878)
    6   2  zero
    8   4  bytes that follow the header
    12  4  bytes of the content
    16 32  SHA-256 of the content
    48  4  CRC-32 (as zlib has it) of the bytes 0 to 47 and of what follows the header

The checksum of the content names it; the CRC also covers what does not change the content.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import BinaryIO, NamedTuple

from undercroft.model.backup import CHUNK
from undercroft.model.errors import DataCorruptError

CHUNK_KIND, MAP_KIND, MANIFEST_KIND = 1, 2, 3
HEADER = 52
_MAGIC = b"UCP1"
_HEAD = struct.Struct("<4sBBHII32s")
_MOST = 64 << 20  # bytes that any record may have: a manifest of a very large VM
_LEVEL = 1
ZERO_HASH = bytes(32)
"""Stands for a chunk of zeroes in a map. (No content is known that has this checksum.)"""


class Head(NamedTuple):
    """What a header says."""

    kind: int
    codec: int
    stored: int
    length: int
    digest: bytes


def digest_of(content: bytes | bytearray | memoryview) -> bytes:
    """What names a content."""
    return hashlib.sha256(content).digest()


class Encoder:
    """Makes records. One per thread."""

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)

    def encode(
        self, kind: int, digest: bytes, content: bytes | bytearray | memoryview
    ) -> tuple[bytes, bytes]:
        """Header and body of a record."""
        body = self._zstd.compress(content)
        codec = 1
        if len(body) >= len(content):
            codec, body = 0, bytes(content)
        head = _HEAD.pack(_MAGIC, kind, codec, 0, len(body), len(content), digest)
        return head + struct.pack("<I", zlib.crc32(body, zlib.crc32(head))), body


class Decoder:
    """Reads records. One per thread."""

    def __init__(self) -> None:
        import zstandard

        self._zstd = zstandard.ZstdDecompressor()

    def content(self, head: Head, header: bytes, body: bytes) -> bytes:
        """The content of a record.

        Raises:
            DataCorruptError: it is damaged.
        """
        import zstandard

        if struct.unpack_from("<I", header, 48)[0] != zlib.crc32(body, zlib.crc32(header[:48])):
            raise DataCorruptError("a record is damaged: its CRC is wrong")
        content = body
        if head.codec == 1:
            try:
                content = self._zstd.decompress(body, max_output_size=head.length)
            except zstandard.ZstdError as error:
                raise DataCorruptError(f"a record is damaged: {error}") from None
        if len(content) != head.length or digest_of(content) != head.digest:
            raise DataCorruptError("a record is damaged: its content is not what it was")
        return content


def parse(header: bytes) -> Head:
    """What a header says.

    Raises:
        DataCorruptError: it is none.
    """
    if len(header) != HEADER:
        raise DataCorruptError("a record is cut off")
    magic, kind, codec, zero, stored, length, digest = _HEAD.unpack_from(header)
    if magic != _MAGIC or zero or codec > 1 or kind not in (1, 2, 3):
        raise DataCorruptError("this is no record")
    if stored > _MOST or length > (CHUNK if kind == CHUNK_KIND else _MOST):
        raise DataCorruptError("a record is too large")
    return Head(kind, codec, stored, length, digest)


def read_record(file: BinaryIO) -> tuple[Head, bytes, bytes] | None:
    """The record at a file's position: what its header says, the header, the body; None at the end.

    Raises:
        DataCorruptError: there is none, or it is cut off.
    """
    header = file.read(HEADER)
    if not header:
        return None
    head = parse(header)
    body = file.read(head.stored)
    if len(body) != head.stored:
        raise DataCorruptError("a record is cut off")
    return head, header, body
