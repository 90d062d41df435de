"""Event streams (text/event-stream, HTML standard section 9.2) that survive a daemon's restart."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from undercroft.client.raw import Raw, problem_error
from undercroft.client.transport import Response
from undercroft.model.errors import TimeLimitError, UnavailableError

SILENCE = 45.0  # seconds; the server sends something every 15


class Message(NamedTuple):
    """One event of a stream; ``id`` is that of the last one that had an id."""

    id: str
    event: str
    data: str


def messages(response: Response) -> Iterator[Message]:
    """The events of one response, until it ends."""
    last_id, event, data = "", "", list[str]()
    for line in response.lines():
        if not line:
            if data:
                yield Message(last_id, event or "message", "\n".join(data))
            event, data = "", []
            continue
        name, _, value = line.decode("utf-8", "replace").partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "event":
            event = value
        elif name == "id" and "\0" not in value:
            last_id = value


def follow(
    raw: Raw, path: str, params: Mapping[str, object], position: str, patience: float = 30.0
) -> Iterator[Message]:
    """The events of a stream for ever: where a connection ends, it is taken up again.

    ``position`` is the parameter that says where to begin (``after``); while it is not given, the
    stream begins now. ``patience`` is how many seconds the daemon may be gone.

    Raises:
        DaemonError: it stayed away.
        CompactedError: too much happened meanwhile.
    """
    params = dict(params)
    deadline: float | None = None
    while True:
        try:
            with raw.request("GET", path, params=params, timeout=SILENCE) as response:
                deadline = None
                for message in messages(response):
                    if message.event == "error":
                        raise problem_error(raw.transport.where, 0, message.data.encode())
                    if message.id:
                        params[position] = message.id
                    yield message
        except (UnavailableError, TimeLimitError):
            now = time.monotonic()
            if deadline is None:
                deadline = now + patience
            if now >= deadline:
                raise
        time.sleep(0.25)
