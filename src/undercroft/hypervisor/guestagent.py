"""The guest agent (qemu-ga): commands run inside the guest.

Everything it says is the guest's word: bounded, checked, never trusted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

from undercroft.model.requests import ExecResult


class GuestAgent:
    """Client of one guest's agent. One command at a time; connects when first needed.

    All methods raise `GuestAgentError` (absent, refused, nonsense) and `TimeLimitError`.
    """

    def __init__(self, name: str, path: Path) -> None:
        """For vm ``name``, through the socket at ``path``. Connects when first needed."""

    async def ping(self, timeout: float = 2.0) -> bool:
        """Whether it answers within ``timeout`` seconds. Does not raise."""

    async def exec(
        self,
        argv: Sequence[str],
        *,
        input: bytes | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 60.0,
    ) -> ExecResult:
        """Runs a program and waits for its end."""

    def read_file(self, path: str) -> AsyncIterator[bytes]:
        """The content of a file."""

    async def write_file(
        self, path: str, content: AsyncIterator[bytes], mode: int | None = None
    ) -> int:
        """Writes a file; its size."""

    async def shutdown(self, timeout: float = 5.0) -> None:
        """Asks the guest to power down; returns when asked, not when done."""

    async def addresses(self, timeout: float = 5.0) -> tuple[str, ...]:
        """IP addresses of the guest, loopback and link-local left out."""

    async def set_time(self) -> None:
        """Sets the guest's clock from the host's (after a resume)."""

    async def freeze(self) -> int:
        """Freezes file systems; how many."""

    async def thaw(self) -> int:
        """Thaws them; how many."""

    async def close(self) -> None:
        """Hangs up."""
