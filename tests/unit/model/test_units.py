"""Sizes and durations: what people write, what they get to read, and nonsense."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from undercroft.model.errors import InvalidError
from undercroft.model.units import (
    GiB,
    KiB,
    MiB,
    TiB,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", KiB),
        ("512M", 512 * MiB),
        ("512 mb", 512 * MiB),
        ("10GiB", 10 * GiB),
        ("1.5G", 3 * GiB // 2),
        ("0.000001T", 1099511),
        (" 2t ", 2 * TiB),
        ("1P", 1024 * TiB),
    ],
)
def test_sizes_are_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1..5G", "1,5G", "1e9", "0x10", "1 2", "12X", "٣M", "1M\n1", "9" * 19]
)
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidError, match="is not a size") as caught:
        parse_size(text)
    assert caught.value.action


@given(st.integers(0, 1 << 60))
def test_a_size_reads_back_as_itself_or_nearly(size: int) -> None:
    again = parse_size(format_size(size))
    assert abs(again - size) <= size * 0.05 + 0.5
    if size % KiB == 0 and "." not in format_size(size):
        assert again == size


@given(st.integers(1, 1023), st.sampled_from([KiB, MiB, GiB, TiB]))
def test_whole_units_are_exact(count: int, unit: int) -> None:
    assert parse_size(format_size(count * unit)) == count * unit
    assert format_size(-count * unit) == f"-{format_size(count * unit)}"


@given(st.text())
@example("1ſ")  # matches "s" where case is ignored, but is another letter
@example("1K")  # the Kelvin sign
@example("1İB")
def test_nonsense_is_refused_and_nothing_worse(text: str) -> None:
    for parse in (parse_size, parse_duration):
        try:
            value = parse(text)
        except InvalidError:
            continue
        assert value >= 0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("1.5m", 90), ("2h", 7200), ("1d", 86400), ("250ms", 0.25)],
)
def test_durations_are_understood(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "250ms"),
        (1, "1s"),
        (45.9, "45s"),
        (60, "1m"),
        (200, "3m 20s"),
        (7500, "2h 5m"),
        (7205, "2h"),
        (4 * 86400 + 3 * 3600 + 59, "4d 3h"),
    ],
)
def test_durations_are_told_in_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
