"""Sizes and durations as people write them. Inside Undercroft: bytes, seconds, cores."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SIZE = re.compile(
    r"\s*([0-9]{1,18}(?:\.[0-9]{1,6})?)\s*([kmgtp]?)(i?b?)\s*", re.ASCII | re.IGNORECASE
)
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4, "p": 5}
_DURATION = re.compile(
    r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*(ms|s|m|h|d|)\s*", re.ASCII | re.IGNORECASE
)
_SECONDS = {"ms": 0.001, "s": 1.0, "": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(text: str) -> int:
    """Bytes from ``512M``, ``1.5G``, ``10GiB`` or ``4096``; the prefixes are powers of 1024.

    Raises:
        InvalidError: not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        from undercroft.model.errors import InvalidError  # only then: it is not light

        raise InvalidError(
            f"{text[:40]!r} is not a size", action="write it like 512M, 1.5G or 10GiB"
        )
    number, prefix, _ = match.groups()
    scale = 1 << 10 * _POWER[prefix.lower()]
    whole, _, fraction = number.partition(".")
    size = int(whole) * scale
    if fraction:
        size += int(fraction) * scale // 10 ** len(fraction)
    return size


def format_size(size: int) -> str:
    """A size for people: exact where a whole number of units fits, else one decimal (``1.5G``)."""
    if size < 0:
        return f"-{format_size(-size)}"
    for power, prefix in ((5, "P"), (4, "T"), (3, "G"), (2, "M"), (1, "K")):
        unit = 1024**power
        if size >= unit:
            whole, rest = divmod(size, unit)
            if rest == 0:
                return f"{whole}{prefix}"
            return f"{size / unit:.1f}{prefix}"
    return f"{size}B"


def parse_duration(text: str) -> float:
    """Seconds from ``90``, ``90s``, ``1.5m``, ``2h``, ``1d`` or ``250ms``.

    Raises:
        InvalidError: not a duration.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        from undercroft.model.errors import InvalidError  # only then: it is not light

        raise InvalidError(f"{text[:40]!r} is not a duration", action="write it like 30s, 5m or 2h")
    return float(match.group(1)) * _SECONDS[match.group(2).lower()]


def format_duration(seconds: float) -> str:
    """A duration for people, two units at most: ``45s``, ``3m 20s``, ``2h 5m``, ``4d 3h``."""
    if seconds < 1:
        return f"{seconds * 1000:.0f}ms"
    total = int(seconds)
    days, rest = divmod(total, 86400)
    hours, rest = divmod(rest, 3600)
    minutes, secs = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "m"), (secs, "s")]
    while parts and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{n}{unit}" for n, unit in parts[:2] if n) or "0s"
