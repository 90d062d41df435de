"""Sizes of volumes."""

import pytest

from undercroft.model.errors import InvalidError
from undercroft.model.volume import check_volume_size


@pytest.mark.parametrize(
    ("size", "told", "action"),
    [
        (100 << 40, "a disk of 100T is not possible", "choose a size from 1M"),
        (10, "10 means 10 bytes", "did you mean 10G?"),
        ((1 << 20) + 1, "1048577 bytes is not a whole number", "multiple of 1M"),
    ],
)
def test_a_size_that_cannot_be_is_named_as_people_do(size: int, told: str, action: str) -> None:
    with pytest.raises(InvalidError) as caught:
        check_volume_size(size)
    assert told in caught.value.message
    assert action in (caught.value.action or "")
