"""Unix sockets in directories whose path may be longer than the 108 bytes of ``sockaddr_un``.

The directory is opened, and the socket named through ``/proc/self/fd/N/name``.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

__all__ = ["connect", "listen", "peer"]


@contextlib.contextmanager
def _short(path: Path) -> Iterator[tuple[int, str]]:
    """The directory's descriptor, and a short name for the path."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield directory, f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path, *, mode: int = 0o600, backlog: int = 16) -> socket.socket:
    """A listening stream socket at ``path``, in place of whatever was there. It can be connected
    to only by whom ``mode`` admits, from its first moment on. It does not block: while QEMU starts,
    two of its threads may accept the same connection, and the second would hang for ever.

    Raises:
        OSError: the directory is missing or not ours.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with _short(path) as (directory, name):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path.name, dir_fd=directory)
            listener.bind(name)
            # Before listen() nobody can connect, so there is no moment with a laxer mode.
            os.chmod(path.name, mode, dir_fd=directory)
        listener.setblocking(False)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def connect(path: Path) -> socket.socket:
    """A non-blocking socket connected to the listener at ``path``.

    Raises:
        OSError: nobody listens there (ConnectionRefusedError, FileNotFoundError), or its
            backlog is full (BlockingIOError).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        connection.setblocking(False)
        with _short(path) as (_, name):
            connection.connect(name)
    except BaseException:
        connection.close()
        raise
    return connection


def peer(connection: socket.socket) -> tuple[int, int, int]:
    """Pid, uid and gid of the other side (SO_PEERCRED, unix(7)): for a client those of the
    process that called listen(2) last before the connection was made."""
    size = struct.calcsize("3i")
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    pid, uid, gid = struct.unpack("3i", credentials)
    return pid, uid, gid
