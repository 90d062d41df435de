from __future__ import annotations

import hashlib
import ssl
import stat
from pathlib import Path

import pytest
from cryptography import x509

from undercroft.api.certificate import ensure_certificate, server_context
from undercroft.model.errors import DataCorruptError, DataError


def test_it_is_made_once(tmp_path: Path) -> None:
    first = ensure_certificate(tmp_path / "tls", "192.0.2.7")
    assert stat.S_IMODE(first.key.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "tls").stat().st_mode) == 0o700
    der = ssl.PEM_cert_to_DER_cert(first.certificate.read_text())
    assert first.fingerprint == hashlib.sha256(der).hexdigest()
    names = x509.load_der_x509_certificate(der).extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    addresses = {str(address) for address in names.value.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "::1", "192.0.2.7"}
    assert ensure_certificate(tmp_path / "tls") == first
    assert server_context(first).minimum_version is ssl.TLSVersion.TLSv1_2
    assert {path.name for path in (tmp_path / "tls").iterdir()} == {"certificate.pem", "key.pem"}


@pytest.mark.parametrize("address", [None, "", "0.0.0.0", "::", "host.example"])
def test_any_address_will_do(tmp_path: Path, address: str | None) -> None:
    assert len(ensure_certificate(tmp_path / "tls", address).fingerprint) == 64


def test_half_of_it_is_made_anew(tmp_path: Path) -> None:
    first = ensure_certificate(tmp_path / "tls")
    first.certificate.unlink()
    second = ensure_certificate(tmp_path / "tls")
    assert second.fingerprint != first.fingerprint
    server_context(second)


def test_what_does_not_fit(tmp_path: Path) -> None:
    one = ensure_certificate(tmp_path / "one")
    other = ensure_certificate(tmp_path / "other")
    one.key.write_bytes(other.key.read_bytes())
    with pytest.raises(DataCorruptError, match="go together"):
        server_context(one)
    one.certificate.write_text("nonsense")
    with pytest.raises(DataCorruptError, match="no certificate"):
        ensure_certificate(tmp_path / "one")
    with pytest.raises(DataError):
        ensure_certificate(tmp_path / "none" / "tls")
