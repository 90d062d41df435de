"""The channel to a guest agent: one JSON command at a time over the agent's socket.

The other side belongs to the guest. It may be absent, talk nonsense or never stop, so every
answer has a largest size and a time limit. After anything unexpected the connection is dropped;
the next command begins with ``guest-sync-delimited``, which throws away whatever is left over
(QEMU Guest Agent Protocol Reference).
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from undercroft.hypervisor import sockets
from undercroft.model.errors import GuestAgentError, TimeLimitError

__all__ = ["AgentChannel"]

_READ = 256 << 10
_DELIMITER = b"\xff"
_LARGEST = 1 << 20  # bytes of an answer


class _Failure(msgspec.Struct):
    desc: str = ""
    class_: str = msgspec.field(default="", name="class")


class _Answer(msgspec.Struct):
    return_: Any = msgspec.field(default=msgspec.UNSET, name="return")
    error: _Failure | None = None


_DECODER = msgspec.json.Decoder(_Answer)


class AgentChannel:
    """Connects when first needed. ``present`` is what QEMU says about the guest's side of the
    port: False as long as no agent has it open, None if not known."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.present: bool | None = None
        self._path = path
        self._lock = asyncio.Lock()
        self._connection: socket.socket | None = None
        self._buffer = bytearray()
        self._closed = False

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout: float,
        largest: int = _LARGEST,
        answers: bool = True,
    ) -> Any:
        """Runs a command and returns what it returned; ``answers`` False: it has no answer but
        for errors, which come at once if at all.

        Raises:
            GuestAgentError: absent, refused, or nonsense (``data``: ``command``, ``reason``).
            TimeLimitError: no answer in time.
        """
        if self.present is False:
            raise GuestAgentError(
                f"no guest agent runs in {self.name}",
                object=self.name,
                action="wait until the guest has booted, or install qemu-guest-agent in it",
                command=command,
            )
        message: dict[str, Any] = {"execute": command}
        if arguments:
            message["arguments"] = arguments
        clean = False
        try:
            async with asyncio.timeout(timeout), self._lock:
                try:
                    await self._synchronise()
                    await self._send(msgspec.json.encode(message) + b"\n")
                    result = None
                    if answers:
                        result = self._decode(await self._line(largest), command)
                    clean = True
                    return result
                except _RefusedError as refused:
                    clean = True
                    raise GuestAgentError(
                        f"the guest agent in {self.name} refused {command}: {refused}",
                        object=self.name,
                        command=command,
                    ) from None
                finally:
                    if not clean:
                        self._drop()
        except TimeoutError as error:
            raise TimeLimitError(
                f"the guest agent in {self.name} did not answer {command} within {timeout:g} s",
                object=self.name,
                command=command,
            ) from error
        except OSError as error:
            raise GuestAgentError(
                f"the channel to the guest agent in {self.name} is broken: {error}",
                object=self.name,
                command=command,
            ) from error

    async def _synchronise(self) -> None:
        """After connecting: skips what is left of earlier conversations."""
        if self._connection is not None:
            return
        if self._closed:
            raise ConnectionResetError("closed")
        self._connection = sockets.connect(self._path)
        self._buffer.clear()
        number = secrets.randbelow(1 << 31)
        sync = {"execute": "guest-sync-delimited", "arguments": {"id": number}}
        await self._send(_DELIMITER + msgspec.json.encode(sync) + b"\n")
        while True:
            line = await self._line(_LARGEST)
            _, found, answer = line.rpartition(_DELIMITER)
            with contextlib.suppress(GuestAgentError, _RefusedError):
                if found and self._decode(answer, "guest-sync-delimited") == number:
                    return

    async def _send(self, data: bytes) -> None:
        if self._connection is None:
            raise ConnectionResetError("not connected")
        await asyncio.get_running_loop().sock_sendall(self._connection, data)

    async def _line(self, largest: int) -> bytes:
        """The next line. Raises GuestAgentError if it is longer than ``largest``."""
        if self._connection is None:
            raise ConnectionResetError("not connected")
        loop = asyncio.get_running_loop()
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            if searched > largest:
                raise GuestAgentError(
                    f"the guest agent in {self.name} sent more than {largest} bytes",
                    object=self.name,
                )
            data = await loop.sock_recv(self._connection, _READ)
            if not data:
                raise ConnectionResetError("QEMU closed it")
            self._buffer += data
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def _decode(self, line: bytes, command: str) -> Any:
        try:
            answer = _DECODER.decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise self.nonsense(command) from error
        if answer.error is not None:
            raise _RefusedError(answer.error.desc[:500])
        if answer.return_ is msgspec.UNSET:
            raise self.nonsense(command)
        return answer.return_

    def nonsense(self, command: str) -> GuestAgentError:
        """The error for an answer that is not what the protocol says."""
        return GuestAgentError(
            f"the guest agent in {self.name} answered {command} with nonsense",
            object=self.name,
            command=command,
        )

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._buffer.clear()

    async def close(self) -> None:
        """Hangs up, for good."""
        self._closed = True
        async with self._lock:
            self._drop()


class _RefusedError(Exception):
    """The agent answered with an error."""
