from __future__ import annotations

import asyncio
import grp
import json
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.api.world import World, ask, running_world
from undercroft.api import gate, peers, server
from undercroft.api.server import ApiServer, bind_unix, parse_listen
from undercroft.client.client import Client
from undercroft.client.connect import Endpoint, parse_url
from undercroft.client.raw import Raw
from undercroft.model.errors import (
    DaemonError,
    DataError,
    DataLockedError,
    ForbiddenError,
    InvalidError,
    UnauthenticatedError,
    UnavailableError,
)
from undercroft.model.requests import ExecRequest
from undercroft.model.vm import VMState

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to change its user")


def exchange(path: Path, request: bytes, wait: float = 10.0) -> bytes:
    """Everything that comes back until the server ends the connection."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(wait)
        connection.connect(str(path))
        connection.sendall(request)
        data = b""
        while piece := connection.recv(65536):
            data += piece
        return data


def in_child(work: Callable[[], bytes]) -> bytes:
    """What the work returns in a process of its own, which may change its user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.write(writer, work())
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        data = stream.read()
    os.waitpid(child, 0)
    return data


async def test_the_socket_is_private(world: World) -> None:
    status = world.directory.socket.lstat()
    assert stat.S_ISSOCK(status.st_mode)
    group = gate.group_id()
    wanted = 0o600 if group is None else 0o660
    assert stat.S_IMODE(status.st_mode) == wanted
    names = {path.name for path in world.directory.run.iterdir()}
    assert names == {"api.sock", "vms"}, "nothing half-made is left"


@as_root
async def test_the_group_may_connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "group_id", lambda: NOBODY)
    listener = bind_unix(tmp_path / "s")
    status = (tmp_path / "s").lstat()
    assert (status.st_gid, stat.S_IMODE(status.st_mode)) == (NOBODY, 0o660)
    listener.close()


async def test_a_path_longer_than_a_socket_address(tmp_path: Path) -> None:
    async with running_world(tmp_path / ("d" * 120) / ("e" * 60)) as world:
        assert len(str(world.directory.socket)) > 180
        assert (await ask(world, lambda c: c.version())).pid == os.getpid()
        assert world.directory.socket.exists()
        await world.add_vms(1, VMState.RUNNING)

        def work(client: Client) -> bytes | None:
            with client.vms.console("web0", 3) as console:
                return console.receive(10)

        assert await ask(world, work) == b"xxx"
    assert not world.directory.socket.exists()


async def test_a_dead_daemons_socket_is_replaced(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "s"))
    dead.close()
    listener = bind_unix(tmp_path / "s")
    listener.listen()
    with pytest.raises(DataLockedError):
        bind_unix(tmp_path / "s")
    listener.close()


async def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    async with running_world(tmp_path / "data") as world:
        await world.server.stop()
        world.directory.socket.write_text("precious")
        with pytest.raises(DataError, match="something else"):
            await ApiServer(world.operations, world.directory).start()
        assert world.directory.socket.read_text() == "precious"


async def test_stopping_does_not_remove_the_next_daemons_socket(world: World) -> None:
    world.directory.socket.unlink()
    other = bind_unix(world.directory.socket)
    await world.server.stop()
    assert world.directory.socket.exists()
    other.close()


async def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(DaemonError) as caught:
        Client(Endpoint(path=str(tmp_path / "none"))).version()
    assert "croft daemon" in (caught.value.action or "")


async def test_stopping_does_not_wait_for_requests_that_take_long(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    request = ExecRequest(argv=("sleep",), timeout=60.0)
    asking = asyncio.ensure_future(ask(world, lambda c: c.vms.exec("web0", request)))
    await world.host.began.wait()
    began = time.monotonic()
    await world.server.stop()
    assert time.monotonic() - began < 15
    with pytest.raises(DaemonError):
        await asking


async def test_stopping_lets_requests_finish(world: World) -> None:
    await world.add_vms(1, VMState.RUNNING)
    request = ExecRequest(argv=("sleep", "well"), timeout=0.5)
    asking = asyncio.ensure_future(ask(world, lambda c: c.vms.exec("web0", request)))
    await world.host.began.wait()
    await world.server.stop()
    assert (await asking).stdout == b"sleep well"


async def test_what_is_not_http(world: World) -> None:
    cases = [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n", 400),
        (b"GET /" + b"x" * 500_000, 431),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 1_000_000, 431),
    ]

    def work(request: bytes) -> bytes:
        try:
            return exchange(world.directory.socket, request)
        except (BrokenPipeError, ConnectionResetError):
            return b""  # refused while it was still being sent

    for request, status in cases:
        data = await asyncio.to_thread(work, request)
        if data or status == 400:
            head, _, body = data.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 %d" % status), request[:40]
            assert b"application/problem+json" in head
            assert json.loads(body)["code"]
    assert (await ask(world, lambda c: c.version())).api == "v1"


async def test_a_head_that_never_ends(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "HEAD_TIME", 0.2)

    def work() -> bytes:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(20)
            connection.connect(str(world.directory.socket))
            connection.sendall(b"GET / HTTP/1.1\r\n")
            for _ in range(30):
                try:
                    connection.sendall(b"a: b\r\n")
                except BrokenPipeError:
                    break
                time.sleep(0.05)
            try:
                return connection.recv(1)
            except ConnectionResetError:
                return b""

    assert await asyncio.to_thread(work) == b""


async def test_requests_in_one_go(world: World) -> None:
    one = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    data = await asyncio.to_thread(exchange, world.directory.socket, one * 5 + last)
    assert data.count(b"HTTP/1.1 200 OK") == 6
    assert data.count(b"date: ") == 6


# Who asks


def peer(uid: int, gid: int = NOBODY, *groups: int) -> dict[str, object]:
    return {"state": {"peer": peers.Peer(1, uid, gid, groups)}, "headers": []}


async def test_who_may_ask(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    identify = gate.Identification(world.server.tokens, own_uid=1234)
    monkeypatch.setattr(gate, "group_id", lambda: 77)
    for allowed in (peer(0), peer(1234), peer(5, 77), peer(5, 6, 7, 77)):
        assert identify(allowed).has("vm.create")
    for refused in (peer(5), peer(5, 6, 7)):
        with pytest.raises(ForbiddenError, match="may not use"):
            identify(refused)
    monkeypatch.setattr(gate, "group_id", lambda: None)
    with pytest.raises(ForbiddenError):
        identify(peer(5, 77))


def test_groups_by_the_user_database() -> None:
    assert os.getgid() in peers._groups_of(os.getuid(), os.getgid())
    assert peers._groups_of(4_000_000_000, 7) == (7,)


def test_the_group_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def known(name: str) -> grp.struct_group:
        assert name == "undercroft"
        return grp.struct_group(("undercroft", "x", 99, []))

    monkeypatch.setattr(grp, "getgrnam", known)
    assert gate.group_id() == 99


@as_root
async def test_another_user_is_known_and_refused(world: World) -> None:
    world.directory.socket.chmod(0o666)
    for parent in world.directory.socket.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)

    def work() -> bytes:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        try:
            Raw(world.endpoint).get("/v1")
        except ForbiddenError as error:
            return f"{error.message}|{error.action}".encode()
        return b"let in"

    message, _, action = (await asyncio.to_thread(in_child, work)).decode().partition("|")
    assert "may not use this daemon" in message
    assert "undercroft" in action


@as_root
async def test_another_user_of_the_group_is_let_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "group_id", lambda: 4242)
    world.directory.socket.chmod(0o666)
    for parent in world.directory.socket.parents:
        if parent.stat().st_uid == os.geteuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)

    def work() -> bytes:
        os.setgroups([4242])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        return str(Raw(world.endpoint).get("/v1")["product"]).encode()

    assert await asyncio.to_thread(in_child, work) == b"Undercroft"


@as_root
async def test_a_socket_that_may_not_be_opened(world: World) -> None:
    world.directory.socket.chmod(0o600)

    def work() -> bytes:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        Raw(world.endpoint).get("/v1")
        return b"let in"

    said = await asyncio.to_thread(in_child, work)
    assert said.startswith(b"ForbiddenError: you may not use the daemon's socket")


# TCP


async def test_tls_and_token(tmp_path: Path) -> None:
    async with running_world(tmp_path / "data", "127.0.0.1:0") as world:
        assert world.server.address is not None
        assert world.server.certificate is not None
        host, port = world.server.address
        url = f"https://{host}:{port}"
        fingerprint = world.server.certificate.fingerprint
        token = world.server.tokens.create("ada")
        viewer = world.server.tokens.create("eve", ["vm.view"])
        await world.add_vms(1, VMState.RUNNING)

        def use(token: str | None, fingerprint: str | None, ca: str | None = None) -> Client:
            endpoint = parse_url(url, token=token, fingerprint=fingerprint, ca=ca)
            return Client(endpoint, timeout=10)

        def good() -> None:
            certificate = world.server.certificate
            assert certificate is not None
            with use(token, fingerprint.upper()) as client:
                assert client.version().product == "Undercroft"
                assert client.vms.get("web0").meta.name == "web0"
                with client.vms.console("web0", 4) as console:
                    assert console.receive(10) == b"xxxx"
                    console.send(b"hello")
                    assert console.receive(10) == b"hello"
                content = bytes(3_000_000)
                assert client.vms.write_file("web0", "/x", iter([content])) == len(content)
                assert b"".join(client.vms.read_file("web0", "/x")) == content
                assert client.vms.list()
            with use(token, None, str(certificate.certificate)) as client:
                assert client.version().product == "Undercroft"

        await asyncio.to_thread(good)

        def bad() -> None:
            with use(None, fingerprint) as client, pytest.raises(UnauthenticatedError) as caught:
                client.version()
            assert "CROFT_TOKEN" in (caught.value.action or "")
            for wrong in ("croft_x", token[:-1], token + "x", "ü"):
                with use(wrong, fingerprint) as client, pytest.raises(UnauthenticatedError):
                    client.version()
            with use("croft_x", fingerprint) as client, pytest.raises(UnauthenticatedError):
                client.vms.console("web0")
            with (
                use(token, "ab" * 32) as client,
                pytest.raises(UnauthenticatedError, match="not the one"),
            ):
                client.version()
            with use(token, None) as client, pytest.raises(UnauthenticatedError, match="trusted"):
                client.version()

        await asyncio.to_thread(bad)

        def limited() -> None:
            with use(viewer, fingerprint) as client:
                assert client.vms.list()
                with pytest.raises(ForbiddenError, match=r"vm\.power"):
                    client.vms.start("web0")
                with pytest.raises(ForbiddenError, match=r"event\.view"):
                    next(client.events.follow())
                with pytest.raises(ForbiddenError, match=r"task\.view"):
                    next(client.watch("vm", "task"))
                with pytest.raises(ForbiddenError, match=r"vm\.console"):
                    client.vms.console("web0")
                with pytest.raises(ForbiddenError):
                    client.raw.request("GET", "/metrics")

        await asyncio.to_thread(limited)
        world.server.tokens.remove("eve")

        def gone() -> None:
            with use(viewer, fingerprint) as client, pytest.raises(UnauthenticatedError):
                client.vms.list()

        await asyncio.to_thread(gone)

        def plain() -> bytes:
            with socket.create_connection((host, port), 10) as connection:
                connection.sendall(b"GET /v1 HTTP/1.1\r\nhost: x\r\n\r\n")
                try:
                    return connection.recv(1000)
                except ConnectionResetError:
                    return b""

        assert b"200" not in await asyncio.to_thread(plain)


async def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UnavailableError, match=str(port)):
            async with running_world(tmp_path / "data", f"127.0.0.1:{port}"):
                pass
    assert not (tmp_path / "data" / "run" / "api.sock").exists()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("127.0.0.1:8773", ("127.0.0.1", 8773)),
        ("[::1]:1", ("::1", 1)),
        (":0", ("", 0)),
        ("host.example:65535", ("host.example", 65535)),
    ],
)
def test_addresses_to_listen_on(text: str, found: tuple[str, int]) -> None:
    assert parse_listen(text) == found


@pytest.mark.parametrize(
    "text", ["", "8773", "a:b", "a:65536", "::1:5", "a b:1", "h:-1", "h:", "é:1"]
)
def test_addresses_that_are_none(text: str) -> None:
    with pytest.raises(InvalidError):
        parse_listen(text)
