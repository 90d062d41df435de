"""A guest's serial console: read without pause, kept within bounds, shown to whoever attaches.

A guest may say as much as it likes. QEMU sends a byte at a time, so a reader that answers each
byte would burn a core for every guest that floods its console. So we wait a moment between reads
and take what has gathered; a guest that has used up its burst has to wait longer. What we do not
read stays in the socket, and when that is full the guest's serial port is busy.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from undercroft.hypervisor.log import BoundedLog, read_tail
from undercroft.hypervisor.plan import LogLimits
from undercroft.model.errors import BusyError, UnavailableError

__all__ = ["CONSOLE_LOG", "ConsolePump", "ConsoleSession", "read_log"]

CONSOLE_LOG = "console.log"

_READ = 64 << 10
_PACE = 0.001  # seconds between two reads
_SLOW_PACE = 0.01  # the same for a guest that has used up its burst
_BURST = 1 << 20  # bytes that may come at full pace …
_REFILL = 32 << 10  # … and how many of them are given back per second
_SESSION_LIMIT = 256 << 10  # bytes that wait for a session that is slow
_MOST_SESSIONS = 64
_SKIPPED = b"\r\n[output skipped]\r\n"


class ConsoleSession:
    """One attachment (satisfies `operations.services.ConsoleSession`)."""

    def __init__(self, pump: ConsolePump, first: bytes) -> None:
        self._pump = pump
        self._chunks: deque[bytes] = deque([first] if first else [])
        self._size = len(first)
        self._skipped = False
        self._ended = False
        self._wake = asyncio.Event()

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Scrollback, then output as it comes; ends when the console does. A session that does
        not keep up misses output, and is told so in the stream."""
        return self._read()

    async def _read(self) -> AsyncIterator[bytes]:
        while True:
            while self._chunks:
                data = b"".join(self._chunks)
                self._chunks.clear()
                self._size = 0
                if self._skipped:
                    self._skipped = False
                    data = _SKIPPED + data
                yield data
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    def feed(self, data: bytes) -> None:
        """Called by the pump: queues output, dropping the oldest beyond the limit."""
        self._chunks.append(data)
        self._size += len(data)
        while self._size > _SESSION_LIMIT and len(self._chunks) > 1:
            self._size -= len(self._chunks.popleft())
            self._skipped = True
        self._wake.set()

    def end(self) -> None:
        """Called by the pump: no more will come."""
        self._ended = True
        self._wake.set()

    async def write(self, data: bytes) -> None:
        """Types; waits while the guest does not take it.

        Raises:
            UnavailableError: the console has ended.
        """
        if self._ended:
            raise UnavailableError("this console has ended")
        await self._pump.write(data)

    async def close(self) -> None:
        """Detaches."""
        self._pump.drop(self)
        self.end()


class ConsolePump:
    """Reads a console socket into a bounded log on disk and to the sessions."""

    def __init__(
        self,
        connection: socket.socket,
        directory: Path,
        limits: LogLimits,
        *,
        fresh: bool = False,
        on_lost: Callable[[int], None] | None = None,
    ) -> None:
        """Takes over a connected, non-blocking socket and starts. ``fresh``: the machine was just
        started, so that what the log has is of an earlier run, and no scrollback. ``on_lost`` is
        told how many bytes the log could not take, once per shortage."""
        self._connection = connection
        self._limits = limits
        self._on_lost = on_lost
        self._log = BoundedLog(directory / CONSOLE_LOG, limits.console)
        self._said: int | None = 0 if fresh else None  # bytes of this run, if known
        self._pending = bytearray()  # read, but not in the log yet
        self._log_lock = asyncio.Lock()
        self._sessions: set[ConsoleSession] = set()
        self._write_lock = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._closed = False
        self._flusher: asyncio.Task[None] | None = None
        self._task = asyncio.create_task(self._run())

    async def attach(self, scrollback: int = 16384) -> ConsoleSession:
        """A new session, starting with up to ``scrollback`` bytes of what was said before (at
        most `LogLimits.scrollback`).

        Raises:
            BusyError: too many are attached already.
        """
        if len(self._sessions) >= _MOST_SESSIONS:
            raise BusyError(f"{_MOST_SESSIONS} sessions are attached to this console already")
        scrollback = min(max(scrollback, 0), self._limits.scrollback)
        async with self._log_lock:
            logged = scrollback
            if self._said is not None:
                logged = min(logged, self._said - len(self._pending))
            before = await asyncio.to_thread(read_tail, self._log.path, logged)
            # No await from here on: what is read from now on reaches the session by `feed`.
            before += bytes(self._pending)
            session = ConsoleSession(self, before[-scrollback:] if scrollback else b"")
            if self._closed:
                session.end()
            else:
                self._sessions.add(session)
        return session

    def drop(self, session: ConsoleSession) -> None:
        """Forgets a session."""
        self._sessions.discard(session)

    async def write(self, data: bytes) -> None:
        """Sends input to the guest, in one piece; waits while the guest does not take it.

        Raises:
            UnavailableError: the console has ended.
        """
        async with self._write_lock:
            view = memoryview(data)
            while view:
                if self._closed:
                    raise UnavailableError("this console has ended")
                try:
                    view = view[self._connection.send(view) :]
                except BlockingIOError:
                    await self._wait_writable()
                except OSError as error:
                    raise UnavailableError("this console has ended") from error

    async def _wait_writable(self) -> None:
        loop = asyncio.get_running_loop()
        self._writable = loop.create_future()
        loop.add_writer(self._connection, self._on_writable)
        try:
            await self._writable
        finally:
            if not self._closed:
                loop.remove_writer(self._connection)
            self._writable = None

    def _on_writable(self) -> None:
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    async def _run(self) -> None:
        """Reads until the other side ends."""
        loop = asyncio.get_running_loop()
        credit, last = float(_BURST), loop.time()
        try:
            while True:
                data = await loop.sock_recv(self._connection, _READ)
                if not data:
                    return
                self._take(data)
                now = loop.time()
                credit = min(_BURST, credit + (now - last) * _REFILL) - len(data)
                last = now
                pace = _PACE if credit > 0 else _SLOW_PACE
                credit = max(credit, 0.0)
                await asyncio.sleep(max(pace, len(data) / self._limits.rate))
                if len(self._pending) > self._limits.rate and self._flusher is not None:
                    await asyncio.wait((self._flusher,))  # the disk is slower than the guest
        except OSError:
            return
        finally:
            self._end_sessions()

    def _take(self, data: bytes) -> None:
        for session in self._sessions:
            session.feed(data)
        self._pending += data
        if self._said is not None:
            self._said += len(data)
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush())

    async def _flush(self) -> None:
        while self._pending:
            async with self._log_lock:
                data = bytes(self._pending)
                was_lost = self._log.lost
                kept = await asyncio.to_thread(self._log.write, data)
                del self._pending[: len(data)]
            if not kept and not was_lost and self._on_lost is not None:
                self._on_lost(len(data))

    def _end_sessions(self) -> None:
        for session in self._sessions:
            session.end()
        self._sessions.clear()

    async def finish(self) -> None:
        """Waits until the other side has ended and everything is in the log."""
        await asyncio.wait((self._task,))
        await self.close()

    async def close(self) -> None:
        """Stops reading; ends all sessions. The guest goes on."""
        if self._closed:
            return
        self._closed = True
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        self._end_sessions()
        if self._writable is not None:
            asyncio.get_running_loop().remove_writer(self._connection)
            self._on_writable()
        if self._flusher is not None:
            await asyncio.wait((self._flusher,))
        self._connection.close()
        self._log.close()


def read_log(directory: Path, limit: int) -> bytes:
    """The last ``limit`` bytes of the console log in DATA/vms/ID, also of a stopped VM. Blocks."""
    return read_tail(directory / CONSOLE_LOG, limit)
