"""Forwarded ports as users write them."""

from __future__ import annotations

from undercroft.cli.errors import UsageError


def parse_forwards(texts: list[str]) -> list[dict[str, object]]:
    """The API's forwards for ``[ADDRESS:]HOST:GUEST[/udp]`` or just ``GUEST`` (a free host port is
    chosen).

    Raises:
        UsageError: not written like that.
    """
    return [_parse(text) for text in texts]


def _parse(text: str) -> dict[str, object]:
    ports, slash, protocol = text.partition("/")
    parts = ports.split(":")
    numbers = parts[-2:]
    if (
        len(parts) > 3
        or (slash and protocol not in ("tcp", "udp"))
        or not all(part.isascii() and part.isdigit() and int(part[:6]) < 65536 for part in numbers)
        or int(numbers[-1]) == 0
    ):
        raise UsageError(
            f"{text!r} does not say which port leads where",
            "write HOST:GUEST such as 8080:80, or 127.0.0.1:8080:80, or 5353:53/udp",
        )
    forward: dict[str, object] = {"guest_port": int(numbers[-1])}
    if len(numbers) == 2:
        forward["host_port"] = int(numbers[0])
    if len(parts) == 3:
        forward["host_address"] = parts[0]
    if slash:
        forward["protocol"] = protocol
    return forward
