"""LUKS headers: what the format says about them, and that the passphrase leads to the key."""

from __future__ import annotations

import hashlib
import struct

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from undercroft.storage.formats import luks

SECTOR = 512


def diffuse(block: bytes) -> bytes:
    """As in section 2.4 of the specification, for SHA-256."""
    pieces = [block[at : at + 32] for at in range(0, len(block), 32)]
    return b"".join(
        hashlib.sha256(struct.pack(">I", number) + piece).digest()
        for number, piece in enumerate(pieces)
    )


def merge(material: bytes, length: int, stripes: int) -> bytes:
    """What was split."""
    mixed = bytes(length)
    for number in range(stripes):
        stripe = material[number * length : (number + 1) * length]
        mixed = bytes(a ^ b for a, b in zip(mixed, stripe, strict=True))
        if number < stripes - 1:
            mixed = diffuse(mixed)
    return mixed


def unlock(header: bytes, passphrase: bytes) -> bytes | None:
    """The master key, if the passphrase is right."""
    length = struct.unpack_from(">I", header, 108)[0]
    digest, salt, iterations = struct.unpack_from(">20s32sI", header, 112)
    _, rounds, slot_salt, offset, stripes = struct.unpack_from(">II32sII", header, 208)
    derived = hashlib.pbkdf2_hmac("sha256", passphrase, slot_salt, rounds, length)
    encrypted = header[offset * SECTOR : offset * SECTOR + length * stripes]
    material = b""
    for at in range(0, len(encrypted), SECTOR):
        tweak = (at // SECTOR).to_bytes(16, "little")
        decryptor = Cipher(algorithms.AES(derived), modes.XTS(tweak)).decryptor()
        material += decryptor.update(encrypted[at : at + SECTOR])
    master = merge(material, length, stripes)
    right = hashlib.pbkdf2_hmac("sha256", master, salt, iterations, 20) == digest
    return master if right else None


@settings(max_examples=8, deadline=None)
@given(st.binary(min_size=1, max_size=80), st.binary(min_size=1, max_size=80))
def test_the_passphrase_opens_it_and_no_other(passphrase: bytes, other: bytes) -> None:
    header = luks.luks_header(passphrase)
    assert unlock(header, passphrase) is not None
    if other != passphrase:
        assert unlock(header, other) is None


def test_no_two_have_the_same_key() -> None:
    assert unlock(luks.luks_header(b"x"), b"x") != unlock(luks.luks_header(b"x"), b"x")


def test_slots_lie_apart_and_before_the_payload() -> None:
    header = luks.luks_header(b"x")
    magic, version, cipher, mode, hash, payload, length = struct.unpack_from(
        ">6sH32s32s32sII", header
    )
    assert (magic, version, length) == (b"LUKS\xba\xbe", 1, 64)
    names = [text.rstrip(b"\0").decode() for text in (cipher, mode, hash)]
    assert names == ["aes", "xts-plain64", "sha256"]
    end = 4096
    for slot in range(8):
        active, _, _, offset, stripes = struct.unpack_from(">II32sII", header, 208 + 48 * slot)
        assert active == (0x00AC71F3 if slot == 0 else 0x0000DEAD)
        assert offset * SECTOR >= end
        end = offset * SECTOR + length * stripes
    assert end <= payload * SECTOR == luks.SIZE
    assert len(header) <= luks.SIZE
