"""TLS, and proxies in front of it."""

from __future__ import annotations

import contextlib
import datetime as dt
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.unit.storage.webserver import Page, Web, answer, serving
from undercroft.model.errors import FetchError
from undercroft.storage.fetch import FetchOptions, fetch_text
from undercroft.storage.http import HttpLimits

OPTIONS = FetchOptions(attempts=2, backoff=0.01, http=HttpLimits(connect=5.0, answer=5.0))


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate with its key, for 127.0.0.1."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def secure(certificate: Path) -> Iterator[Web]:
    with serving() as web:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        web.socket = context.wrap_socket(web.socket, server_side=True)
        web.pages["/x"] = Page(b"in confidence")
        yield web


@pytest.fixture
def trusting(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))


def address(web: Web, path: str) -> str:
    return web.url(path).replace("http:", "https:")


@pytest.mark.usefixtures("trusting")
async def test_whom_we_trust(secure: Web) -> None:
    assert await fetch_text(address(secure, "/x"), OPTIONS) == "in confidence"


async def test_whom_we_do_not_trust(secure: Web) -> None:
    with pytest.raises(FetchError, match="cannot be trusted") as caught:
        await fetch_text(address(secure, "/x"), OPTIONS)
    assert "ca-certificates" in str(caught.value.action)
    assert secure.requests == []


@pytest.mark.usefixtures("trusting")
async def test_another_name_than_the_certificate_has(secure: Web) -> None:
    url = address(secure, "/x").replace("127.0.0.1", "localhost")
    with pytest.raises(FetchError, match="cannot be trusted"):
        await fetch_text(url, OPTIONS)


@pytest.mark.usefixtures("trusting")
async def test_never_down_from_https(secure: Web) -> None:
    with serving() as plain:
        plain.pages["/x"] = Page(b"in the open")
        secure.pages["/down"] = Page(script=[answer(302, Location=plain.url("/x"))])
        with pytest.raises(FetchError, match="from https to http"):
            await fetch_text(address(secure, "/down"), OPTIONS)
        assert plain.requests == []
        plain.pages["/up"] = Page(script=[answer(302, Location=address(secure, "/x"))])
        assert await fetch_text(plain.url("/up"), OPTIONS) == "in confidence"


async def test_a_server_that_speaks_no_tls() -> None:
    with serving() as plain, pytest.raises(FetchError, match="gives no answer"):
        await fetch_text(address(plain, "/x"), OPTIONS)


@contextlib.contextmanager
def proxy(status: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy for one tunnel after another; gives its address, and what it was asked."""
    asked: list[bytes] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def work() -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = server.accept()
                with client:
                    head = b""
                    while b"\r\n\r\n" not in head:
                        head += client.recv(4096)
                    asked.append(head)
                    client.sendall(b"HTTP/1.1 %s\r\n\r\n" % status)
                    if status.startswith(b"200"):
                        port = int(head.split()[1].rpartition(b":")[2])
                        with socket.create_connection(("127.0.0.1", port)) as target:
                            back = threading.Thread(target=pump, args=(target, client))
                            back.start()
                            pump(client, target)
                            back.join()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield f"http://me:secret@127.0.0.1:{server.getsockname()[1]}", asked
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.usefixtures("trusting")
async def test_a_tunnel_through_a_proxy(secure: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(b"200 OK") as (url, asked):
        monkeypatch.setenv("https_proxy", url)
        assert await fetch_text(address(secure, "/x"), OPTIONS) == "in confidence"
    port = secure.server_address[1]
    assert asked[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % port)
    assert b"Proxy-Authorization: Basic bWU6c2VjcmV0\r\n" in asked[0]


async def test_a_proxy_that_refuses(secure: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with proxy(b"407 Who are you?") as (url, _):
        monkeypatch.setenv("https_proxy", url)
        with pytest.raises(FetchError, match=r"proxy 127\.0\.0\.1 answers 407") as caught:
            await fetch_text(address(secure, "/x"), OPTIONS)
    assert "secret" not in caught.value.message
    assert secure.requests == []
