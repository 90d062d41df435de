"""The daemon's certificate for TLS: DATA/tls, made by itself at first use.

It is signed by its own key. Clients pin its fingerprint, so that needs no authority, and no name in
it has to fit. Whoever has a certificate of an authority puts it in place of ours.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import ipaddress
import os
import secrets
import socket
import ssl
from pathlib import Path
from typing import NamedTuple

from undercroft.model.errors import DataCorruptError, DataError

CERTIFICATE = "certificate.pem"
KEY = "key.pem"
YEARS = 10


class Certificate(NamedTuple):
    """Files in PEM; ``fingerprint`` is the SHA-256 of the certificate in hex."""

    certificate: Path
    key: Path
    fingerprint: str


def ensure_certificate(directory: Path, address: str | None = None) -> Certificate:
    """The certificate in this directory; made first if there is none. Blocks.

    Raises:
        DataError: it cannot be written. DataCorruptError: what is there is no certificate.
    """
    certificate, key = directory / CERTIFICATE, directory / KEY
    try:
        if not (certificate.exists() and key.exists()):
            directory.mkdir(mode=0o700, exist_ok=True)
            key_pem, certificate_pem = _make(address)
            _write(key, key_pem, 0o600)
            _write(certificate, certificate_pem, 0o644)
        return Certificate(certificate, key, fingerprint(certificate))
    except OSError as error:
        raise DataError(
            f"the certificate in {directory} cannot be made: {error.strerror}",
            object=str(directory),
        ) from None


def fingerprint(certificate: Path) -> str:
    """The SHA-256 of the (first) certificate of a file, in hex.

    Raises:
        DataCorruptError: it holds none. OSError: it cannot be read.
    """
    text = certificate.read_text("ascii", "replace")
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    try:
        inner = text[text.index(begin) : text.index(end) + len(end)]
        return hashlib.sha256(ssl.PEM_cert_to_DER_cert(inner)).hexdigest()
    except ValueError:
        raise DataCorruptError(
            f"{certificate} holds no certificate",
            object=str(certificate),
            action="remove it together with the key beside it: both are made anew",
        ) from None


def server_context(certificate: Certificate) -> ssl.SSLContext:
    """TLS 1.2 and newer, with this certificate.

    Raises:
        DataCorruptError: certificate and key do not belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.options |= ssl.OP_NO_RENEGOTIATION
    try:
        context.load_cert_chain(certificate.certificate, certificate.key)
    except ssl.SSLError as error:
        raise DataCorruptError(
            f"the certificate and the key in {certificate.key.parent} do not go together: {error}",
            object=str(certificate.key.parent),
            action="remove both: they are made anew",
        ) from None
    return context


def _make(address: str | None) -> tuple[bytes, bytes]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    host = socket.gethostname()[:64] or "undercroft"
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
    names: list[x509.GeneralName] = [x509.DNSName("localhost")]
    if host.isascii() and host != "localhost":
        names.append(x509.DNSName(host))
    for text in dict.fromkeys(("127.0.0.1", "::1", address or "")):
        try:
            found = ipaddress.ip_address(text)
        except ValueError:
            continue
        if not found.is_unspecified:
            names.append(x509.IPAddress(found))
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))  # clocks differ
        .not_valid_after(now + dt.timedelta(days=365 * YEARS))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    return (
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
        certificate.public_bytes(serialization.Encoding.PEM),
    )


def _write(path: Path, data: bytes, mode: int) -> None:
    half = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(half, path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
