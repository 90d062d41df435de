"""The monitor of one QEMU: commands, and events as they come (QMP, through ``qemu.qmp``)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
    Runstate,
    StateError,
)

from undercroft.model.errors import QmpError, TimeLimitError

__all__ = ["Monitor", "MonitorEvent"]

_DRAIN_TIMEOUT = 1.0

MonitorEvent = Mapping[str, Any]
"""``event``, ``data`` and ``timestamp`` as in the QMP specification."""


class _Client(QMPClient):
    """The library's client with events handed on at once.

    Its own listeners keep every event for ever (``history``, and the default queue that nobody
    empties): a guest that makes QEMU emit events would fill our memory.
    """

    # Bounded, as QEMU may be in the hands of its guest. What it says of a disk grows with the
    # square of the number of its layers, each of which is described with all beneath it.
    _readbuflen = 64 << 20

    def __init__(
        self, on_event: Callable[[MonitorEvent], None], on_close: Callable[[], None]
    ) -> None:
        super().__init__(readbuflen=self._readbuflen)
        self._on_event = on_event
        self._on_close = on_close
        self.ended = asyncio.Event()
        # What the library logs as errors are ends of connections, which we tell apart ourselves.
        self.logger = logging.getLogger("undercroft.hypervisor.qmp.wire")
        self.logger.setLevel(logging.CRITICAL + 1)

    async def _event_dispatch(self, msg: Message) -> None:
        self._on_event(msg)

    async def _bh_disconnect(self) -> None:
        try:
            await super()._bh_disconnect()
        finally:
            self.ended.set()
            self._on_close()


class Monitor:
    """A QMP session. ``name`` is how messages call the VM.

    ``on_event`` is called for every event, in order; ``on_close`` once when the connection has
    ended, by whichever side. Commands raise `QmpError` (QEMU refused: ``data`` has its error
    class; or the connection is gone) and `TimeLimitError`.
    """

    def __init__(
        self,
        name: str,
        on_event: Callable[[MonitorEvent], None],
        on_close: Callable[[], None],
    ) -> None:
        self.name = name
        self._on_event = on_event
        self._watchers: dict[asyncio.Queue[MonitorEvent], frozenset[str]] = {}
        self._client = _Client(self._see, on_close)
        self._socket: socket.socket | None = None
        self._descriptors = asyncio.Lock()
        # A failing connect() disconnects by itself, and the library cannot do that twice at once.
        self._session = asyncio.Lock()

    @property
    def version(self) -> tuple[int, int, int]:
        """QEMU's version, from its greeting."""
        greeting = self._client.greeting
        if greeting is None:
            raise QmpError(f"the monitor of {self.name} is not connected")
        version = cast(Mapping[str, int], greeting.QMP.version["qemu"])
        return version["major"], version["minor"], version["micro"]

    @property
    def connected(self) -> bool:
        """Whether commands can be sent."""
        return self._client.runstate is Runstate.RUNNING

    async def connect(self, connection: socket.socket, *, timeout: float) -> None:
        """Opens the session over a connected socket, which it then owns.

        Raises:
            QmpError, TimeLimitError: the other side hung up, or said nothing.
        """
        self._socket = connection
        try:
            async with self._session, asyncio.timeout(timeout):
                await self._client.connect(connection)
        except TimeoutError as error:
            connection.close()
            raise TimeLimitError(
                f"the monitor of {self.name} did not answer within {timeout:g} s"
            ) from error
        except ConnectError as error:
            connection.close()
            raise QmpError(f"the monitor of {self.name} hung up: {error.exc}") from error

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = 30.0
    ) -> Any:
        """Runs a command and returns what it returned."""
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            raise TimeLimitError(
                f"QEMU of {self.name} did not answer {command} within {timeout:g} s",
                command=command,
            ) from error
        except ExecuteError as error:
            raise QmpError(
                f"QEMU of {self.name} refused {command}: {error.error.error.desc}",
                command=command,
                qmp_class=error.error.error.class_,
            ) from error
        except (ExecInterruptedError, StateError, QMPError, EOFError, OSError) as error:
            raise QmpError(
                f"the monitor of {self.name} went away during {command}", command=command
            ) from error

    @contextlib.contextmanager
    def watching(self, *names: str) -> Iterator[asyncio.Queue[MonitorEvent]]:
        """Inside the block: a queue of the events of these names, which ``on_event`` has seen
        before. (Not for events that a guest can make at will: nothing bounds it.)"""
        queue: asyncio.Queue[MonitorEvent] = asyncio.Queue()
        self._watchers[queue] = frozenset(names)
        try:
            yield queue
        finally:
            del self._watchers[queue]

    def _see(self, event: MonitorEvent) -> None:
        self._on_event(event)
        for queue, names in self._watchers.items():
            if event["event"] in names:
                queue.put_nowait(event)

    async def give(self, descriptor: int, name: str) -> None:
        """Hands a descriptor to QEMU (SCM_RIGHTS), to be used by ``name`` (``getfd``)."""
        async with self._descriptors:
            self._send(descriptor)
            await self.execute("getfd", {"fdname": name})

    async def add_to_set(
        self, descriptor: int, number: int | None = None, name: str | None = None
    ) -> int:
        """Hands a descriptor to QEMU as part of an fdset, a new one without ``number``; returns
        the set's number: ``/dev/fdset/N``. ``name``: the node that it is for."""
        async with self._descriptors:
            self._send(descriptor)
            given = {"fdset-id": number, "opaque": name}
            arguments = {key: value for key, value in given.items() if value is not None}
            answer = await self.execute("add-fd", arguments)
        return int(answer["fdset-id"])

    async def remove_set(self, number: int) -> None:
        """Takes an fdset away again."""
        await self.execute("remove-fd", {"fdset-id": number})

    def _send(self, descriptor: int) -> None:
        """Sends a space, which QMP ignores, with the descriptor attached. (The library's own way
        needs asyncio's transport, which uvloop does not have.)"""
        try:
            if self._socket is None:
                raise OSError("not connected")
            socket.send_fds(self._socket, [b" "], [descriptor])
        except OSError as error:
            raise QmpError(f"the monitor of {self.name} takes no descriptor: {error}") from error

    async def drain(self) -> None:
        """Once QEMU has ended: takes what it sent before that, then closes."""
        if self.connected:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._client.ended.wait(), _DRAIN_TIMEOUT)
        await self.close()

    async def close(self) -> None:
        """Ends the session; QEMU goes on."""
        async with self._session:
            with contextlib.suppress(QMPError, EOFError, OSError):
                await self._client.disconnect()
