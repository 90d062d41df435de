"""Names that people give, identifiers that Undercroft gives, and that the two never meet."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.errors import InvalidError
from undercroft.model.names import (
    PREFIX,
    check_labels,
    check_name,
    is_id,
    new_id,
    new_mac,
)


@pytest.mark.parametrize("name", ["a", "web1", "web-1.example", "0", "x" * 63])
def test_good_names(name: str) -> None:
    assert check_name(name) == name
    assert check_name(name, "image") == name


@pytest.mark.parametrize(
    "name",
    ["", "-a", "a-", ".a", "a.", "a..b", "A", "a b", "a/b", "a_b", "é", "a\n", "x" * 64, "a:b"],
)
def test_bad_names(name: str) -> None:
    with pytest.raises(InvalidError):
        check_name(name)


@pytest.mark.parametrize("name", ["debian:12", "my_image", "a.b_c-d:1.0"])
def test_images_have_tags(name: str) -> None:
    assert check_name(name, "image") == name


@pytest.mark.parametrize("name", [":12", "a:", "a:b:c", "a:-b", "../x"])
def test_bad_image_names(name: str) -> None:
    with pytest.raises(InvalidError):
        check_name(name, "image")


@pytest.mark.parametrize("kind", sorted(PREFIX))
def test_ids_have_their_form_and_are_no_names(kind: str) -> None:
    ids = {new_id(kind) for _ in range(100)}
    assert len(ids) == 100
    for id in ids:
        assert is_id(id)
        with pytest.raises(InvalidError, match="looks like an identifier"):
            check_name(id)


@given(st.text())
def test_nonsense_names_are_refused_and_nothing_worse(text: str) -> None:
    for kind in ("vm", "image"):
        try:
            name = check_name(text, kind)
        except InvalidError:
            continue
        assert name == text
        assert name.isascii()
        assert not is_id(name)


@given(st.dictionaries(st.text(), st.text(), max_size=70))
def test_nonsense_labels_are_refused_and_nothing_worse(labels: dict[str, str]) -> None:
    try:
        assert check_labels(labels) is labels
    except InvalidError:
        return
    assert len(labels) <= 64
    assert all(value.isprintable() for value in labels.values())


def test_too_many_labels() -> None:
    check_labels({f"k{n}": "" for n in range(64)})
    with pytest.raises(InvalidError, match="65 labels"):
        check_labels({f"k{n}": "" for n in range(65)})


def test_macs_are_unicast_and_local() -> None:
    for _ in range(50):
        first = int(new_mac()[:2], 16)
        assert first & 1 == 0
        assert first & 2 == 2
