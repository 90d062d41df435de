from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.client.connect import (
    DEFAULT_PORT,
    Endpoint,
    find_endpoint,
    open_socket,
    parse_url,
)
from undercroft.client.raw import quote, target
from undercroft.model.errors import DaemonError, InvalidError


def test_the_data_directorys_socket_by_default() -> None:
    endpoint = find_endpoint(Path("/data/run/api.sock"), {})
    assert (endpoint.path, str(endpoint)) == ("/data/run/api.sock", "unix:/data/run/api.sock")
    with pytest.raises(InvalidError):
        find_endpoint(None, {})


def test_the_environment_decides() -> None:
    endpoint = find_endpoint(
        "/data/run/api.sock",
        {
            "CROFT_URL": "https://croft.example:1234/",
            "CROFT_TOKEN": "croft_x",
            "CROFT_FINGERPRINT": "SHA256:" + ":".join(["AB"] * 32),
            "CROFT_CA": "",
        },
    )
    assert (endpoint.host, endpoint.port) == ("croft.example", 1234)
    assert (endpoint.token, endpoint.ca) == ("croft_x", None)
    assert endpoint.fingerprint == "ab" * 32
    assert endpoint.authority == "croft.example:1234"
    assert find_endpoint("/x", {"CROFT_URL": "unix:/y"}).path == "/y"


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://10.0.0.1", "10.0.0.1", DEFAULT_PORT),
        ("https://[::1]", "::1", DEFAULT_PORT),
        ("https://[::1]:99", "::1", 99),
    ],
)
def test_addresses(url: str, host: str, port: int) -> None:
    endpoint = parse_url(url)
    assert (endpoint.host, endpoint.port) == (host, port)
    assert str(endpoint) == (url if url.endswith("99") else f"{url}:{DEFAULT_PORT}")


def test_unix_addresses() -> None:
    assert parse_url("unix:/a/b").path == "/a/b"
    assert parse_url("unix:///a/b").path == "/a/b"


@pytest.mark.parametrize(
    "url",
    [
        "http://host:1",
        "host:1",
        "unix:relative",
        "unix:",
        "https://",
        "https://:1",
        "https://host:0",
        "https://host:65536",
        "https://host:x",
        "https://host:1/path",
        "https://user@host",
        "https://[::1",
        "https://[::1]x",
        "https://a\nb",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InvalidError):
        parse_url(url)


def test_plain_http_is_refused_with_a_reason() -> None:
    with pytest.raises(InvalidError, match="not encrypted"):
        find_endpoint(None, {"CROFT_URL": "http://host:1", "CROFT_TOKEN": "secret"})


@pytest.mark.parametrize("fingerprint", ["", "ab", "zz" * 32, "ab" * 31])
def test_fingerprints_that_are_none(fingerprint: str) -> None:
    with pytest.raises(InvalidError):
        parse_url("https://host", fingerprint=fingerprint)


def test_nobody_there(tmp_path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(tmp_path / "dead"))
    dead.close()
    for path in ("none", "dead", "d" * 150 + "/none"):
        with pytest.raises(DaemonError, match="no daemon answers"):
            open_socket(Endpoint(path=str(tmp_path / path)))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DaemonError, match=str(port)):
        open_socket(Endpoint(host="127.0.0.1", port=port))


def test_someone_there_who_does_not_speak_tls(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(DaemonError):
            open_socket(Endpoint(host="127.0.0.1", port=port, fingerprint="ab" * 32), timeout=0.2)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_quoting_is_undone_by_everybody(text: str) -> None:
    from urllib.parse import parse_qs, unquote

    assert unquote(quote(text)) == text
    assert "/" not in quote(text)
    query = target("/x", {"a": text, "b": None, "c": [1, 2], "d": True}).partition("?")[2]
    found = parse_qs(query, keep_blank_values=True)
    assert found == {"a": [text], "c": ["1,2"], "d": ["true"]}


def test_the_quick_way_stays_light() -> None:
    """`croft ls` has 120 ms in all: none of these may be imported on its way."""
    heavy = {
        *("msgspec", "ssl", "http.client", "urllib.parse", "typing", "dataclasses", "email"),
        *("websockets", "asyncio", "logging", "undercroft.model"),
    }
    code = "import sys, undercroft.client.raw; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert heavy.isdisjoint(done.stdout.split())
