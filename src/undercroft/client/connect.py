"""Where the daemon is, and a connected socket to it.

Kept free of heavy imports (``ssl``, ``typing``, ``dataclasses``, msgspec): this is on the way of
every command.
"""

from __future__ import annotations

import os
import socket

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from undercroft.model.errors import UndercroftError

DEFAULT_PORT = 8773
CONNECT_TIMEOUT = 10.0
_SUN_PATH_MAX = 107  # sizeof(sun_path) - 1, unix(7)


class Endpoint:
    """Where a daemon listens: a unix socket, or host and port with TLS and a token.

    ``fingerprint`` is the SHA-256 of the server's certificate in lower-case hex: it is compared
    instead of names and issuers. ``ca`` is a file of certificates to trust. Without either, the
    system's certificates decide.
    """

    __slots__ = ("ca", "fingerprint", "host", "path", "port", "token")

    def __init__(
        self,
        *,
        path: str | None = None,
        host: str | None = None,
        port: int = DEFAULT_PORT,
        token: str | None = None,
        fingerprint: str | None = None,
        ca: str | None = None,
    ) -> None:
        self.path = path
        self.host = host
        self.port = port
        self.token = token
        self.fingerprint = fingerprint
        self.ca = ca

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        host = f"[{self.host}]" if self.host is not None and ":" in self.host else self.host
        return f"https://{host}:{self.port}"

    @property
    def authority(self) -> str:
        """What goes into the Host header."""
        return "localhost" if self.path is not None else str(self)[len("https://") :]


def find_endpoint(
    socket_path: str | os.PathLike[str] | None, environ: Mapping[str, str] | None = None
) -> Endpoint:
    """The daemon that ``CROFT_URL`` names, else the one whose data directory has this socket.

    ``CROFT_URL`` is ``unix:/path`` or ``https://host:port``; with the latter ``CROFT_TOKEN`` is the
    token, and ``CROFT_FINGERPRINT`` or ``CROFT_CA`` what to trust.

    Raises:
        InvalidError: the address makes no sense, or would send a token in the clear.
    """
    environ = os.environ if environ is None else environ
    url = environ.get("CROFT_URL", "")
    if url:
        return parse_url(
            url,
            token=environ.get("CROFT_TOKEN") or None,
            fingerprint=environ.get("CROFT_FINGERPRINT") or None,
            ca=environ.get("CROFT_CA") or None,
        )
    if socket_path is None:
        raise _invalid("no daemon was named", "set CROFT_URL, or give a data directory")
    return Endpoint(path=os.fspath(socket_path))


def parse_url(
    url: str,
    *,
    token: str | None = None,
    fingerprint: str | None = None,
    ca: str | None = None,
) -> Endpoint:
    """An endpoint from ``unix:/path`` or ``https://host[:port]``.

    Raises:
        InvalidError: neither of these, or a fingerprint that is none.
    """
    if url.startswith("unix:"):
        path = url[5:]
        if path.startswith("//"):
            path = "/" + path.lstrip("/")
        if not path.startswith("/") or "\0" in path:
            raise _invalid(
                f"{url!r} does not name a unix socket", "write unix: and an absolute path"
            )
        return Endpoint(path=path)
    if url.startswith("http://"):
        raise _invalid(
            f"{url!r} is not encrypted, so Undercroft does not speak it",
            "use https://, or unix: on the same machine",
        )
    if not url.startswith("https://"):
        raise _invalid(f"{url!r} is not an address", "write unix:/path or https://host:port")
    host, port = _split_authority(url, url[len("https://") :].rstrip("/"))
    if fingerprint is not None:
        fingerprint = _normal_fingerprint(fingerprint)
    return Endpoint(host=host, port=port, token=token, fingerprint=fingerprint, ca=ca)


def _split_authority(url: str, authority: str) -> tuple[str, int]:
    host, colon, port = authority, "", ""
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        colon, port = rest[:1], rest[1:]
        good = bool(bracket) and colon in ("", ":")
    else:
        host, colon, port = authority.partition(":")
        good = ":" not in port
    good = good and bool(host) and host.isascii() and not set(host) & set("/?#@ \r\n\t\0")
    if colon:
        good = good and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536
    if not good:
        raise _invalid(f"{url!r} is not an address", "write https://host:port, nothing after it")
    return host, int(port) if colon else DEFAULT_PORT


def _normal_fingerprint(text: str) -> str:
    digits = text.strip().lower().removeprefix("sha256:").replace(":", "")
    if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
        raise _invalid(
            f"{text[:80]!r} is not a certificate's fingerprint",
            "give the SHA-256 that the daemon shows: 64 hexadecimal digits",
        )
    return digits


def open_socket(endpoint: Endpoint, timeout: float = CONNECT_TIMEOUT) -> socket.socket:
    """A connected socket, wrapped in TLS where the endpoint is remote. ``timeout`` in seconds.

    Raises:
        DaemonError: nobody answers.
        ForbiddenError: the socket may not be used by this user.
        UnauthenticatedError: the server is not the one that was expected.
    """
    if endpoint.path is not None:
        return _open_unix(endpoint.path, timeout)
    return _open_tls(endpoint, timeout)


def _open_unix(path: str, timeout: float) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    connection.settimeout(timeout)
    try:
        if len(os.fsencode(path)) <= _SUN_PATH_MAX:
            connection.connect(path)
        else:
            # Too long for sockaddr_un: the same place, by way of its directory's descriptor.
            directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
            finally:
                os.close(directory)
    except PermissionError:
        connection.close()
        from undercroft.model.errors import ForbiddenError

        raise ForbiddenError(
            f"you may not use the daemon's socket {path}",
            action="become root or a member of the group 'undercroft', "
            "or use your own daemon (--data, CROFT_DATA)",
        ) from None
    except OSError as error:
        connection.close()
        raise _no_daemon(f"no daemon answers at {path} ({_reason(error)})") from None
    return connection


def _open_tls(endpoint: Endpoint, timeout: float) -> socket.socket:
    import ssl

    host = endpoint.host or "localhost"
    try:
        plain = socket.create_connection((host, endpoint.port), timeout)
    except OSError as error:
        raise _no_daemon(f"no daemon answers at {endpoint} ({_reason(error)})") from None
    try:
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        if endpoint.fingerprint is not None:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE  # the fingerprint below is what counts
        elif endpoint.ca is not None:
            context.load_verify_locations(endpoint.ca)
        else:
            context.load_default_certs()
        connection = context.wrap_socket(plain, server_hostname=host)
        if endpoint.fingerprint is not None:
            _check_fingerprint(endpoint, connection.getpeercert(binary_form=True))
    except ssl.SSLCertVerificationError as error:
        plain.close()
        raise _distrust(
            f"the certificate of {endpoint} is not trusted: {error.verify_message}",
            "set CROFT_FINGERPRINT to what 'croft token create' printed there, or CROFT_CA",
        ) from None
    except FileNotFoundError:
        plain.close()
        raise _invalid(
            f"the file of certificates {endpoint.ca} does not exist", "see CROFT_CA"
        ) from None
    except OSError as error:  # ssl.SSLError is one
        plain.close()
        raise _no_daemon(f"no TLS connection to {endpoint} ({_reason(error)})") from None
    except BaseException:
        plain.close()
        raise
    return connection


def _check_fingerprint(endpoint: Endpoint, certificate: bytes | None) -> None:
    import hashlib
    import hmac

    found = hashlib.sha256(certificate or b"").hexdigest()
    if not hmac.compare_digest(found, endpoint.fingerprint or ""):
        raise _distrust(
            f"{endpoint} shows the certificate {found}, not the one that was expected",
            "if the server's certificate was replaced on purpose, set CROFT_FINGERPRINT anew; "
            "otherwise somebody else answers in its place",
        )


def _reason(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return "it does not react"
    return (error.strerror or str(error) or type(error).__name__).lower()


def _no_daemon(message: str) -> UndercroftError:
    from undercroft.model.errors import DaemonError

    return DaemonError(message, action="start one with 'croft daemon'")


def _invalid(message: str, action: str) -> UndercroftError:
    from undercroft.model.errors import InvalidError

    return InvalidError(message, action=action)


def _distrust(message: str, action: str) -> UndercroftError:
    from undercroft.model.errors import UnauthenticatedError

    return UnauthenticatedError(message, action=action)
