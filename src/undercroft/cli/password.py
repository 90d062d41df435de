"""SHA-512 crypt, the form in which Linux keeps passwords.

After Ulrich Drepper, *Unix crypt using SHA-256 and SHA-512* (version 0.6, 2016). The standard
library's ``crypt`` is gone in Python 3.13.
"""

from __future__ import annotations

import secrets
from hashlib import sha512

_ALPHABET = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ROUNDS = 5000


def hash_password(password: str, salt: str | None = None) -> str:
    """The password as ``$6$salt$hash``; the salt is random unless given."""
    if salt is None:
        salt = "".join(secrets.choice(_ALPHABET) for _ in range(16))
    key, seed = password.encode(), salt.encode()
    alternate = sha512(key + seed + key).digest()
    context = sha512(key + seed + _stretch(alternate, len(key)))
    length = len(key)
    while length:  # one per bit of the length, lowest first
        context.update(alternate if length & 1 else key)
        length >>= 1
    digest = context.digest()
    p = _stretch(sha512(key * len(key)).digest(), len(key))
    s = _stretch(sha512(seed * (16 + digest[0])).digest(), len(seed))
    for number in range(_ROUNDS):
        step = p if number & 1 else digest
        step += s if number % 3 else b""
        step += p if number % 7 else b""
        step += digest if number & 1 else p
        digest = sha512(step).digest()
    return f"$6${salt}${_encode(digest)}"


def _stretch(block: bytes, length: int) -> bytes:
    return (block * (length // len(block) + 1))[:length]


def _encode(digest: bytes) -> str:
    """Base 64 of crypt(5), over bytes that are taken in turns from the three thirds."""
    text = []
    a, b, c = 0, 21, 42
    for _ in range(21):
        text.append(_digits(digest[a] << 16 | digest[b] << 8 | digest[c], 4))
        a, b, c = b + 1, c + 1, a + 1
    return "".join(text) + _digits(digest[63], 2)


def _digits(value: int, count: int) -> str:
    return "".join(_ALPHABET[value >> 6 * i & 63] for i in range(count))
