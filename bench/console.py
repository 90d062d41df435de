"""Reading a guest's serial console until it says what is waited for."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Self

LIMIT = 300.0  # seconds until a guest must be up


class Listener:
    """A unix socket that a serial port connects to, or, with `connect`, one whose other end is
    handed over while we are in its backlog already."""

    def __init__(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection: socket.socket | None = None
        try:
            self.socket.bind(str(path))
            self.socket.listen(1)
            self.socket.settimeout(LIMIT)
        except BaseException:
            self.socket.close()
            raise
        self._path = path

    def connect(self) -> None:
        """Makes us the client, for a serial port that is given this listening socket."""
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(str(self._path))

    def wait_for(self, line: bytes) -> float:
        """When (`time.perf_counter`) the line had arrived.

        Raises:
            TimeoutError: it has not within `LIMIT` seconds.
            EOFError: the console ended before.
        """
        return read_until(self.connection, line)

    @property
    def connection(self) -> socket.socket:
        """Ours: waits for the other end if that is to connect."""
        if self._connection is None:
            self._connection = self.socket.accept()[0]
        return self._connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()
        self.socket.close()
        self._path.unlink(missing_ok=True)


def read_until(connection: socket.socket, line: bytes) -> float:
    """See `Listener.wait_for`."""
    deadline = time.perf_counter() + LIMIT
    seen = b""
    while True:
        connection.settimeout(max(deadline - time.perf_counter(), 0.001))
        data = connection.recv(65536)
        now = time.perf_counter()
        if not data:
            raise EOFError(f"the guest's console ended, having said: {seen[-500:]!r}")
        seen += data
        if line in seen:
            return now
