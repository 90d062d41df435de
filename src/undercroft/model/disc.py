"""How an image of a disc (CD, DVD) is known from anything else."""

from __future__ import annotations

DISC_AT, DISC_SIZE = 16 * 2048 + 1, 5
"""Where a disc says what it is (sector 16, behind the type of the descriptor), and how many bytes
that are."""


def is_disc(identifier: bytes) -> bool:
    """Whether what stands there is of a disc: ISO 9660 (ECMA-119, 8.1) or UDF (ECMA-167, 2/9.1)."""
    return identifier in (b"CD001", b"BEA01")
