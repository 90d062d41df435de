"""LUKS headers (LUKS1 On-Disk Format Specification 1.2.3), as they stand inside qcow2 files.

QEMU writes them, too, but measures for two seconds how often a passphrase must be hashed to be hard
to guess. Ours are 256 random bits, which nobody guesses, and every snapshot and every clone of an
encrypted disk begins with a header of its own.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import struct
import uuid

__all__ = ["SIZE", "luks_header"]

_MAGIC = b"LUKS\xba\xbe"
_SECTOR = 512
_SLOTS = 8
_STRIPES = 4000
_KEY = 64  # bytes: AES-256 twice, as XTS wants it
_ITERATIONS = 1000  # the least that the format allows
_ENABLED, _DISABLED = 0x00AC71F3, 0x0000DEAD
_FIRST = 8  # sector of the first slot's key material
_SLOT = 504  # sectors from one slot to the next: 4000 stripes of 64 bytes, in whole pages
_PAYLOAD = _FIRST + _SLOTS * _SLOT
SIZE = _PAYLOAD * _SECTOR
"""Bytes that a header takes, most of them holes: one of its eight slots is used."""


def luks_header(passphrase: bytes) -> bytes:
    """A header with a new master key, which the passphrase opens: the part of it that is not
    zeroes, `SIZE` bytes being taken. Takes about 20 ms, most of it for what makes a deleted key
    hard to restore from a magnetic disk; blocks."""
    master = secrets.token_bytes(_KEY)
    salt, digest_salt = os.urandom(32), os.urandom(32)
    derived = hashlib.pbkdf2_hmac("sha256", passphrase, salt, _ITERATIONS, _KEY)
    digest = hashlib.pbkdf2_hmac("sha256", master, digest_salt, _ITERATIONS, 20)
    head = struct.pack(
        ">6sH32s32s32sII20s32sI40s",
        _MAGIC, 1, b"aes", b"xts-plain64", b"sha256", _PAYLOAD, _KEY,
        digest, digest_salt, _ITERATIONS, str(uuid.uuid4()).encode(),
    )  # fmt: skip
    for slot in range(_SLOTS):
        used = slot == 0
        head += struct.pack(
            ">II32sII",
            _ENABLED if used else _DISABLED,
            _ITERATIONS if used else 0,
            salt if used else b"",
            _FIRST + slot * _SLOT,
            _STRIPES,
        )
    material = _encrypt(derived, _split(master))
    return head.ljust(_FIRST * _SECTOR, b"\0") + material


def _encrypt(key: bytes, data: bytes) -> bytes:
    """AES-XTS, each sector with its number as the tweak (plain64)."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    algorithm = algorithms.AES(key)
    done = bytearray()
    for at in range(0, len(data), _SECTOR):
        tweak = (at // _SECTOR).to_bytes(16, "little")
        encryptor = Cipher(algorithm, modes.XTS(tweak)).encryptor()
        done += encryptor.update(data[at : at + _SECTOR])
    return bytes(done)


def _split(key: bytes) -> bytes:
    """Spreads a key over stripes of which every one is needed to have it again (section 2.4)."""
    length = len(key)
    noise = os.urandom(length * (_STRIPES - 1))
    mixed = 0
    for at in range(0, len(noise), length):
        mixed ^= int.from_bytes(noise[at : at + length], "big")
        mixed = int.from_bytes(_diffuse(mixed.to_bytes(length, "big")), "big")
    return noise + (mixed ^ int.from_bytes(key, "big")).to_bytes(length, "big")


def _diffuse(block: bytes) -> bytes:
    done = b""
    for index in range(0, len(block), 32):
        number = (index // 32).to_bytes(4, "big")
        done += hashlib.sha256(number + block[index : index + 32]).digest()
    return done
