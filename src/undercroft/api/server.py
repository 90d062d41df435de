"""Listening: the unix socket, and TCP with TLS if that was asked for.

uvicorn's protocols do the talking; its `Server` is left out, which would take over signals and wake
up ten times a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import stat
from pathlib import Path

import structlog
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from undercroft.api.app import create_app
from undercroft.api.certificate import Certificate, ensure_certificate, server_context
from undercroft.api.gate import Gate, Identification, group_id
from undercroft.api.hot import HotReads
from undercroft.api.peers import ApiProtocol, ApiState
from undercroft.api.statistics import Statistics
from undercroft.api.tokens import TokenFile
from undercroft.model.errors import (
    DataError,
    DataLockedError,
    InvalidError,
    UnavailableError,
    UndercroftError,
)
from undercroft.operations.core import Operations
from undercroft.store.datadir import DataDirectory

BACKLOG = 512
GRACE = 0.3  # seconds for streams and consoles to say goodbye
PATIENCE = 2.0  # seconds for requests under way
HANDSHAKE = 15.0  # seconds for TLS
KEEP_ALIVE = 75  # seconds that an idle connection stays open
MAX_MESSAGE = 1 << 20  # bytes of a WebSocket's message
_SUN_PATH_MAX = 107  # sizeof(sun_path) - 1, unix(7)
_log = structlog.get_logger(__name__)


class ApiServer:
    """Serves operations. ``listen`` is ``ADDRESS:PORT`` for TCP (port 0: any that is free).

    After `start`: ``address`` tells the TCP address, ``certificate`` the certificate, both None
    without TCP.
    """

    def __init__(
        self, operations: Operations, directory: DataDirectory, listen: str | None = None
    ) -> None:
        self.statistics = Statistics()
        self.tokens = TokenFile(directory.path / "tokens.json")
        self.certificate: Certificate | None = None
        self.address: tuple[str, int] | None = None
        self._directory = directory
        self._listen = None if listen is None else parse_listen(listen)
        self._stopping = asyncio.Event()
        self._state = ApiState()
        app = create_app(
            operations,
            data=str(directory.path),
            stopping=self._stopping,
            statistics=self.statistics,
        )
        gate = Gate(HotReads(app, operations), Identification(self.tokens), self.statistics)
        self._config = uvicorn.Config(
            gate,
            interface="asgi3",
            http=ApiProtocol,
            ws=WebSocketsSansIOProtocol,
            ws_max_size=MAX_MESSAGE,
            ws_ping_interval=30.0,
            ws_ping_timeout=60.0,
            ws_per_message_deflate=False,
            loop="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE,
        )
        self._servers: list[asyncio.AbstractServer] = []
        self._bound: tuple[int, int] | None = None  # device and inode of our socket file

    async def start(self) -> None:
        """Begins to answer.

        Raises:
            DataLockedError: another daemon answers on the socket.
            DataError: the socket cannot be made.
            UnavailableError: the TCP address cannot be listened on.
        """
        self._config.load()
        # The gate logs what fails, in our own words.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        try:
            await self._start_unix()
            if self._listen is not None:
                await self._start_tcp(*self._listen)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Ends: streams and consoles are told, requests under way get a moment, VMs run on."""
        self._stopping.set()
        for server in self._servers:
            server.close()
        self._servers.clear()
        self._unlink()
        await self._finish(GRACE)
        for connection in list(self._state.connections):
            connection.shutdown()
        await self._finish(PATIENCE)
        tasks = list(self._state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self._state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)

    async def _finish(self, seconds: float) -> None:
        """Lets requests under way come to their end."""
        if self._state.tasks:
            await asyncio.wait(list(self._state.tasks), timeout=seconds)

    def _protocol(self) -> ApiProtocol:
        return ApiProtocol(self._config, self._state, {})

    async def _start_unix(self) -> None:
        path = self._directory.socket
        try:
            listener = bind_unix(path)
        except OSError as error:
            raise _no_socket(path, error) from None
        status = path.lstat()
        self._bound = (status.st_dev, status.st_ino)
        loop = asyncio.get_running_loop()
        # What loops make of a path they would have to bind; here it is bound already.
        self._servers.append(
            await loop.create_unix_server(self._protocol, sock=listener, backlog=BACKLOG)
        )

    async def _start_tcp(self, host: str, port: int) -> None:
        self.certificate = await asyncio.to_thread(
            ensure_certificate, self._directory.path / "tls", host
        )
        context: ssl.SSLContext = server_context(self.certificate)
        loop = asyncio.get_running_loop()
        try:
            server = await loop.create_server(
                self._protocol,
                host or None,
                port,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE,
                backlog=BACKLOG,
            )
        except OSError as error:
            raise UnavailableError(
                f"{host}:{port} cannot be listened on: {_reason(error)}",
                action="choose another with --listen ADDRESS:PORT",
            ) from None
        self._servers.append(server)
        name = server.sockets[0].getsockname()
        self.address = (name[0], name[1])
        _log.info(
            "listening",
            address=self.address[0],
            port=self.address[1],
            fingerprint=self.certificate.fingerprint,
        )

    def _unlink(self) -> None:
        """Removes the socket file, unless it is another daemon's by now."""
        path = self._directory.socket
        with contextlib.suppress(OSError):
            status = path.lstat()
            if (status.st_dev, status.st_ino) == self._bound:
                path.unlink()
        self._bound = None


def bind_unix(path: Path) -> socket.socket:
    """A bound unix socket at this path, however long that is, in place of a dead daemon's.

    It appears with its final permissions: for its owner, and for the group ``undercroft`` if there
    is one and it may be given to it.

    Raises:
        DataLockedError: somebody listens there. OSError: it cannot be made.
    """
    if _answers(path):
        raise DataLockedError(
            f"another daemon answers at {path}",
            object=str(path),
            action="use that one, or stop it first",
        )
    half = path.with_name(f".{path.name}.{os.getpid()}")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        half.unlink(missing_ok=True)
        os.fchmod(listener.fileno(), 0o600)  # what bind() gives the file
        listener.bind(_short(half, directory))
        os.chmod(half, 0o600)
        group = group_id()
        if group is not None:
            with contextlib.suppress(PermissionError):
                os.chown(half, -1, group)
                os.chmod(half, 0o660)
        os.rename(half, path)
    except BaseException:
        listener.close()
        with contextlib.suppress(OSError):
            half.unlink()
        raise
    finally:
        os.close(directory)
    listener.setblocking(False)
    return listener


def _short(path: Path, directory: int) -> str:
    """A name for the path that fits into a sockaddr_un, by way of its directory's descriptor."""
    text = os.fspath(path)
    if len(os.fsencode(text)) <= _SUN_PATH_MAX:
        return text
    return f"/proc/self/fd/{directory}/{path.name}"


def _answers(path: Path) -> bool:
    """Whether somebody listens there. Raises OSError if what is there is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "something else is in its place", str(path))
    except FileNotFoundError:
        return False
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            probe.connect(_short(path, directory))
            return True
    except TimeoutError:
        return True  # its queue is full: it is alive, if busy
    except OSError:
        return False
    finally:
        os.close(directory)


def parse_listen(text: str) -> tuple[str, int]:
    """Address and port from ``ADDRESS:PORT``, ``[IPV6]:PORT`` or ``:PORT`` (all addresses).

    Raises:
        InvalidError: it is none of these.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        colon = ""
    good = colon and port.isascii() and port.isdigit() and int(port[:6]) < 65536
    if not good or not host.isascii() or set(host) & set("/ \t\r\n\0"):
        raise InvalidError(
            f"{text[:80]!r} is not an address to listen on", action="write ADDRESS:PORT"
        )
    return host, int(port)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _no_socket(path: Path, error: OSError) -> UndercroftError:
    return DataError(
        f"the socket {path} cannot be made: {_reason(error)}",
        object=str(path),
        action="see who owns the directory, or choose another data directory",
    )
