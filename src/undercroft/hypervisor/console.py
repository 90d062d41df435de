"""A guest's serial console: read without pause, kept within bounds, shown to whoever attaches."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path


class ConsoleSession:
    """One attachment (satisfies `operations.services.ConsoleSession`)."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Scrollback, then output as it comes; ends when the console does. A session that does
        not keep up misses output, and is told so in the stream."""

    async def write(self, data: bytes) -> None:
        """Types; waits while the guest does not take it."""

    async def close(self) -> None:
        """Detaches."""


class ConsolePump:
    """Reads a console socket into a bounded log on disk and to the sessions."""

    def attach(self, scrollback: int = 16384) -> ConsoleSession:
        """A new session, starting with up to ``scrollback`` bytes of what was said before."""

    async def close(self) -> None:
        """Stops reading; ends all sessions."""


def read_log(directory: Path, limit: int) -> bytes:
    """The last ``limit`` bytes of DATA/vms/ID/console.log (and .1), also of a stopped VM."""
