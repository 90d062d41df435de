"""Checksum lists in every style that distributions publish."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.errors import FetchError, InvalidError
from undercroft.storage.checksums import Checksum, checksum_in

A = "a1" * 32
B = "b2" * 32
LONG = "c3" * 64
FILE = "disk-12.qcow2"
LIST = "https://images.example/12/SHA256SUMS"

STYLES = {
    "coreutils, as Debian's": f"{B}  other.qcow2\n{A}  {FILE}\n",
    "binary mode, as Ubuntu's": f"{B} *other.img\n{A} *{FILE}\n",
    "with folders": f"{B}  ./raw/other.raw\n{A}  ./qcow2/{FILE}\n",
    "BSD, as FreeBSD's": f"SHA256 (other.qcow2.xz) = {B}\nSHA256 ({FILE}) = {A}\n",
    "BSD with sizes, as Rocky's and CentOS's": (
        f"# other.qcow2: 1024 bytes\nSHA256 (other.qcow2) = {B}\n"
        f"# {FILE}: 619053056 bytes\nSHA256 ({FILE}) = {A}\n"
    ),
    "signed, as Fedora's": (
        "-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA256\n\n"
        f"# {FILE}: 1024 bytes\nSHA256 ({FILE}) = {A}\n"
        "-----BEGIN PGP SIGNATURE-----\n\niQIzBAEBCAAdFiEE\n=abcd\n-----END PGP SIGNATURE-----\n"
    ),
    "upper case, CRLF, blanks": f"\r\n  {A.upper()}  {FILE}  \r\n",
    "other algorithms beside": (
        f"MD5 ({FILE}) = {'d' * 32}\n{'e' * 40}  {FILE}\nSHA1 ({FILE}) = {'e' * 40}\n"
        f"SHA384 ({FILE}) = {'f' * 96}\n{A}  {FILE}\n"
    ),
    "a tag of coreutils": f"SHA256 ({FILE}) = {A}\n",
    "the same twice": f"{A}  {FILE}\nSHA256 ({FILE}) = {A}\n",
}


@pytest.mark.parametrize("text", STYLES.values(), ids=STYLES.keys())
def test_styles(text: str) -> None:
    assert checksum_in(text, FILE, LIST) == Checksum("sha256", A)


@pytest.mark.parametrize(
    "text", [LONG, f"{LONG}\n", f"{LONG}  {FILE}", f"SHA512 ({FILE}) = {LONG}"]
)
def test_sha512_of_its_own_file(text: str) -> None:
    found = checksum_in(text, FILE, f"https://images.example/{FILE}.sha512")
    assert found == Checksum("sha512", LONG)


def test_the_longer_one_counts() -> None:
    assert checksum_in(f"{A}  {FILE}\n{LONG}  {FILE}\n", FILE, LIST).algorithm == "sha512"


def test_a_moving_name_in_a_list_of_its_own() -> None:
    """openSUSE and Arch: the list beside an alias has the name that the build really has."""
    text = f"{A}  disk-12.0-Build5.7.qcow2\n"
    assert checksum_in(text, FILE, f"https://x/{FILE}.sha256").value == A
    with pytest.raises(FetchError, match="does not list"):
        checksum_in(text, FILE, LIST)
    with pytest.raises(FetchError, match="does not list"):
        checksum_in(text + f"{B}  another\n", FILE, f"https://x/{FILE}.sha256")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<html><body>404</body></html>",
        f"{A}  {FILE}.asc\n",
        f"{A}  not-{FILE}\n",
        f"SHA256 ({FILE}.sig) = {A}\n",
        f"SHA256 ({FILE}) = {A[:-1]}\n",
        f"{A}{A[:2]}  {FILE}\n",
        f"MD5 ({FILE}) = {A}\n",
        A,
    ],
)
def test_not_listed(text: str) -> None:
    with pytest.raises(FetchError, match="does not list") as caught:
        checksum_in(text, FILE, LIST)
    assert caught.value.object == LIST


def test_two_answers_are_none() -> None:
    with pytest.raises(FetchError, match="two things"):
        checksum_in(f"{A}  {FILE}\n{B}  {FILE}\n", FILE, LIST)


@pytest.mark.parametrize("text", [A, A.upper(), f"sha256:{A}", f" SHA256:{A}\n"])
def test_a_checksum_as_text(text: str) -> None:
    assert Checksum.parse(text) == Checksum("sha256", A)
    assert Checksum.parse(str(Checksum("sha512", LONG))) == Checksum("sha512", LONG)


@pytest.mark.parametrize(
    "text",
    ["", "x", A[:-1], f"sha512:{A}", f"sha256:{LONG}", f"md5:{'d' * 32}", "sha256:" + A[:-1]],
)
def test_what_is_no_checksum(text: str) -> None:
    with pytest.raises(InvalidError):
        Checksum.parse(text)


@given(st.text(max_size=300))
def test_nothing_is_found_in_noise(text: str) -> None:
    with pytest.raises(FetchError):
        checksum_in(text, FILE, LIST)


@given(
    st.lists(st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=40), max_size=6),
    st.booleans(),
)
def test_one_good_line_is_enough(noise: list[str], bsd: bool) -> None:
    line = f"SHA256 ({FILE}) = {A}" if bsd else f"{A}  {FILE}"
    assert checksum_in("\n".join([*noise, line, *noise]), FILE, LIST).value == A
