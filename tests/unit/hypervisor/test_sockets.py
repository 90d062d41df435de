"""Unix sockets, wherever they are."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from undercroft.hypervisor import sockets


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A directory whose path alone is longer than ``sockaddr_un`` can hold."""
    path = tmp_path / ("d" * 100) / ("e" * 100)
    path.mkdir(parents=True)
    return path


def test_long_path(deep: Path) -> None:
    path = deep / "qmp.sock"
    with sockets.listen(path) as listener, sockets.connect(path) as client:
        assert path.stat().st_mode & 0o777 == 0o600
        server, _ = listener.accept()
        with server:
            server.sendall(b"hello")
            client.setblocking(True)
            assert client.recv(5) == b"hello"
            assert sockets.peer(client) == (os.getpid(), os.getuid(), os.getgid())


def test_replaces_what_a_dead_process_left(deep: Path) -> None:
    path = deep / "qmp.sock"
    sockets.listen(path).close()
    with pytest.raises(ConnectionRefusedError):
        sockets.connect(path)
    with sockets.listen(path), sockets.connect(path):
        pass


def test_nobody_there(deep: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sockets.connect(deep / "none.sock")
    with pytest.raises(FileNotFoundError):
        sockets.listen(deep / "none" / "qmp.sock")


def test_not_inherited(deep: Path) -> None:
    with sockets.listen(deep / "s") as listener, sockets.connect(deep / "s") as client:
        assert not os.get_inheritable(listener.fileno())
        assert not os.get_inheritable(client.fileno())


def test_nobody_hangs_in_accepting_what_another_thread_took(deep: Path) -> None:
    with sockets.listen(deep / "s") as listener, pytest.raises(BlockingIOError):
        listener.accept()


def test_full_backlog_does_not_block(deep: Path) -> None:
    with sockets.listen(deep / "s", backlog=0):
        clients: list[socket.socket] = []
        with pytest.raises(BlockingIOError):
            clients.extend(sockets.connect(deep / "s") for _ in range(10))
        for client in clients:
            client.close()
