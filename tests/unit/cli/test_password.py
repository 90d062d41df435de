"""SHA-512 crypt, held to its specification and to what glibc makes of it."""

import pytest

from undercroft.cli.password import hash_password


@pytest.mark.parametrize(
    ("password", "expected"),
    [
        (
            "Hello world!",
            "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEd"
            "FCoEOfaS35inz1",
        ),
        (  # longer than a block
            "x" * 70,
            "$6$0123456789abcdef$r.WKz9Zdhlwekw/UyTW6q4PAxAW.u5FxW4z3fqHeN9nQyIvCxGuXjJKP5hViHouec."
            "zpNMalGUgH9zznbtuBL/",
        ),
    ],
)
def test_vectors(password, expected):
    assert hash_password(password, expected.split("$")[2]) == expected


def test_the_salt_is_random():
    one, two = hash_password("x"), hash_password("x")
    assert one != two
    assert one.startswith("$6$")
    assert len(one.split("$")[2]) == 16
