"""One HTTP request for something that may be large, from a thread that can be told to stop.

Over http and https only, with limits to every wait, and never from https to http: what was asked
for in confidence is not fetched without. Proxies are those of the environment (``https_proxy``,
``http_proxy``, ``no_proxy``).
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import http.client
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from undercroft.model.errors import FetchError, InvalidError
from undercroft.storage.threads import Stop

__all__ = ["Answer", "HttpLimits", "Temporary", "check_url", "get", "plain_url"]

_AGENT = "undercroft"
_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (408, 425, 429, 500, 502, 503, 504)  # RFC 9110, 8470, 6585: may work another time
# What may stand in an address as it is (RFC 3986); everything else is percent-encoded.
_SAFE = "!#$%&'()*+,/:;=?@[]~"


@dataclass(frozen=True)
class HttpLimits:
    """In seconds: until connected; until the head of the answer is there, or between two pieces of
    its body. ``redirects``: how many are followed."""

    connect: float = 20.0
    answer: float = 60.0
    redirects: int = 10


class Temporary(Exception):
    """It failed in a way that may be over soon. ``after``: seconds that the server asks for."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Answer:
    """An answer whose body is yet to be read."""

    def __init__(self, url: str, response: http.client.HTTPResponse, stop: Stop) -> None:
        self.url = url
        self.status = response.status
        self._response = response
        self._stop = stop

    def header(self, name: str) -> str | None:
        """A header's value."""
        return self._response.headers.get(name)

    @property
    def length(self) -> int | None:
        """Bytes that the body has; None if that is not announced."""
        return self._response.length

    def read(self, size: int) -> bytes:
        """What has come of the body, at most ``size`` bytes; empty at its end.

        Raises:
            Temporary: the connection is gone, or nothing came for too long.
            Stopped: see `Stop`.
        """
        try:
            data = self._response.read1(size)
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._stop.check()
            raise Temporary(f"the connection was cut ({_reason(error)})") from error
        self._stop.check()
        return data


def check_url(url: str) -> SplitResult:
    """The parts of an address that can be fetched from.

    Raises:
        InvalidError: not http or https, without a host, with a password, or not an address at all.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise InvalidError(f"{url[:200]!r} is not an address: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidError(
            f"{url[:200]!r} cannot be fetched", action="give an address with http:// or https://"
        )
    if parts.username is not None or parts.password is not None:
        raise InvalidError(
            f"the address of {parts.hostname} carries a user name or password",
            action="it would be kept in records and logs: fetch the file yourself and import it",
        )
    if not url.isprintable() or " " in url:
        raise InvalidError(f"{url[:200]!r} is not an address: write spaces as %20")
    return parts


def plain_url(url: str) -> str:
    """An address as it may be shown: a query can be a secret."""
    return url.partition("#")[0].partition("?")[0]


@contextmanager
def get(url: str, headers: Mapping[str, str], limits: HttpLimits, stop: Stop) -> Iterator[Answer]:
    """The answer to a GET, after redirects, whatever its status (but not one that asks to try
    again). The connection ends with the block.

    Raises:
        InvalidError: see `check_url`.
        FetchError: too many redirects, or to where none may lead; no trust in the server.
        Temporary: no connection, no answer, or one that says so.
        Stopped: see `Stop`.
    """
    with contextlib.ExitStack() as stack:
        seen = [url]
        while True:
            parts = check_url(url)
            response = _ask(parts, headers, limits, stop, stack)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or location is None:
                break
            stack.close()
            url = _redirected(url, location)
            if url in seen or len(seen) > limits.redirects:
                raise FetchError(
                    f"{plain_url(seen[0])} redirects in circles, or too often", object=seen[0]
                )
            seen.append(url)
        if response.status in _AGAIN:
            reason = f"{parts.hostname} answers {response.status} {response.reason[:80]}"
            raise Temporary(reason, _retry_after(response.headers.get("Retry-After")))
        yield Answer(url, response, stop)


def _redirected(url: str, location: str) -> str:
    target = urljoin(url, quote(location, safe=_SAFE))
    try:
        parts = check_url(target)
    except InvalidError as error:
        raise FetchError(
            f"{plain_url(url)} redirects to where nothing is fetched from: {error.message}",
            object=url,
        ) from None
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise FetchError(
            f"{plain_url(url)} redirects from https to http, which is not followed",
            object=url,
            action="use another mirror",
        )
    return target


def _ask(
    parts: SplitResult,
    headers: Mapping[str, str],
    limits: HttpLimits,
    stop: Stop,
    stack: contextlib.ExitStack,
) -> http.client.HTTPResponse:
    """Sends the request; the head of the answer is there when this returns."""
    host = str(parts.hostname)
    name = _ascii(host)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    proxy = _proxy_for(parts.scheme, f"{host}:{port}")
    target = quote(parts.path or "/", safe=_SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE)
    sent = {"Host": parts.netloc.replace(host, name), "User-Agent": _AGENT, "Accept": "*/*"}
    sent |= {"Accept-Encoding": "identity", "Connection": "close", **headers}
    at = (_ascii(str(proxy.hostname)), proxy.port or 3128) if proxy is not None else (name, port)
    line = stack.enter_context(_dial(at, limits, stop))
    # A peer that trickles bytes would never run into the socket's own time limit.
    timer = threading.Timer(limits.answer, line.cut)
    timer.daemon = True
    timer.start()
    try:
        if proxy is not None and parts.scheme == "http":
            target = f"http://{sent['Host']}{target}"
            sent |= _proxy_authorization(proxy)
        elif proxy is not None:
            _open_tunnel(line.socket, f"{name}:{port}", proxy)
        if parts.scheme == "https":
            line.secure(name)
        connection = http.client.HTTPConnection(name, port)
        connection.sock = line.socket
        connection.response_class = _Response
        stack.callback(connection.close)
        connection.request("GET", target, headers=sent)
        response = connection.getresponse()
        stack.callback(response.close)
        return response
    except ssl.SSLCertVerificationError as error:
        raise FetchError(
            f"{host} cannot be trusted: {error.verify_message}",
            object=parts.geturl(),
            action="check the address, the host's clock, and the package ca-certificates",
        ) from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Temporary(f"{host} gives no answer ({_reason(error)})") from error
    finally:
        timer.cancel()
        stop.check()


class _WholeLines:
    """A file whose `readline` does not take the end of the connection for the end of a line:
    http.client would take a head that is cut off for a whole one, and its body for empty."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def readline(self, limit: int) -> bytes:
        """The next line, or the first ``limit`` bytes of one that is longer."""
        line: bytes = self._file.readline(limit)
        if not line.endswith(b"\n") and len(line) < limit:
            raise http.client.RemoteDisconnected("the connection ends too early")
        return line


class _Response(http.client.HTTPResponse):
    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.fp: Any = _WholeLines(self.fp)


class _Line:
    """A connection that another thread can cut."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    def secure(self, name: str) -> None:
        """Speaks TLS from now on, with whom the name belongs to."""
        context = ssl.create_default_context()
        secured = context.wrap_socket(
            self.socket, server_hostname=name, do_handshake_on_connect=False
        )
        self.socket = secured  # before the handshake, so that it can be cut
        secured.do_handshake()

    def cut(self) -> None:
        """Wakes up whoever waits on the connection."""
        # Not `SSLSocket.shutdown`: that takes the TLS state away under the reader's hands.
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)

    def close(self) -> None:
        """Gives the connection up."""
        self.socket.close()


@contextmanager
def _dial(address: tuple[str, int], limits: HttpLimits, stop: Stop) -> Iterator[_Line]:
    """A connection to the first of the host's addresses that takes one."""
    last: OSError | None = None
    for family, kind, protocol, target in _resolve(address, limits, stop):
        line = _Line(socket.socket(family, kind, protocol))
        with contextlib.closing(line):
            # First said how to interrupt, then looked whether to: nothing falls between.
            stop.also(line.cut)
            stop.check()
            line.socket.settimeout(limits.connect)
            try:
                line.socket.connect(target)
            except OSError as error:
                stop.check()
                last = error
                continue
            line.socket.settimeout(limits.answer)
            yield line
            return
    raise Temporary(f"{address[0]} cannot be reached ({_reason(last)})") from last


_Address = tuple[int, int, int, Any]


def _resolve(address: tuple[str, int], limits: HttpLimits, stop: Stop) -> list[_Address]:
    """The host's addresses. The resolver cannot be interrupted, so it is left alone if need be."""
    found: list[_Address] = []
    failed: list[Exception] = []

    def work() -> None:
        try:
            answer = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
            found.extend((family, kind, number, at) for family, kind, number, _, at in answer)
        except (OSError, UnicodeError) as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="resolve", daemon=True)
    thread.start()
    deadline = time.monotonic() + limits.connect
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(0.05)
        stop.check()
    if found:
        return found
    error = failed[0] if failed else TimeoutError()
    if isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN:
        raise FetchError(
            f"there is no host {address[0]} ({error.strerror})",
            object=address[0],
            action="check the address, and the host's name servers",
        )
    raise Temporary(f"the name {address[0]} cannot be resolved ({_reason(error)})")


def _open_tunnel(connected: socket.socket, target: str, proxy: SplitResult) -> None:
    """Has the proxy pass everything on to the target (RFC 9110, CONNECT)."""
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    lines += [f"{name}: {value}" for name, value in _proxy_authorization(proxy).items()]
    connected.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    response = _Response(connected, method="CONNECT")
    try:
        response.begin()
        if response.status != 200:
            raise FetchError(
                f"the proxy {proxy.hostname} answers {response.status} {response.reason[:80]}",
                object=str(proxy.hostname),
                action="check https_proxy and no_proxy in the daemon's environment",
            )
    finally:
        response.close()


def _proxy_for(scheme: str, host: str) -> SplitResult | None:
    """The proxy that the environment names for a host (with its port)."""
    from urllib.request import getproxies, proxy_bypass

    proxies = getproxies()
    found = proxies.get(scheme) or proxies.get("all")
    if not found or proxy_bypass(host):
        return None
    try:
        parts = urlsplit(found if "://" in found else f"http://{found}")
        if parts.scheme == "http" and parts.hostname and parts.port != 0:
            return parts
    except ValueError:
        pass
    raise FetchError(
        f"the {scheme}_proxy in the daemon's environment cannot be used",
        action="write it as http://HOST:PORT, and restart the daemon",
    )


def _proxy_authorization(proxy: SplitResult) -> dict[str, str]:
    if proxy.username is None:
        return {}
    secret = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(secret.encode()).decode()}"}


def _ascii(host: str) -> str:
    """A host's name as it goes over the wire (RFC 3490)."""
    try:
        return host.encode("ascii").decode()
    except UnicodeError:
        try:
            return host.encode("idna").decode()
        except UnicodeError:
            raise InvalidError(f"{host[:200]!r} is not the name of a host") from None


def _retry_after(text: str | None) -> float | None:
    """Seconds out of a Retry-After header (RFC 9110, section 10.2.3)."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,9}", text.strip()):
        return float(text)
    with contextlib.suppress(ValueError, TypeError):
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def _reason(error: Exception | None) -> str:
    if isinstance(error, TimeoutError) and not str(error):
        return "timed out"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return str(text).partition("\n")[0][:200]
