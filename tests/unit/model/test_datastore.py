"""When somebody is told that a datastore fills."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model.datastore import SLACK, DatastoreSpec, Fill, check_thresholds, fill_of
from undercroft.model.errors import InvalidError

SPEC = DatastoreSpec(host="host-1", path="/srv", warning=0.8, critical=0.95)
CAPACITY = 10_000
free = st.integers(0, CAPACITY)


@given(free, st.sampled_from(Fill))
def test_it_is_never_told_too_late(free: int, before: Fill) -> None:
    used = 1 - free / CAPACITY
    fill = fill_of(SPEC, CAPACITY, free, before)
    assert (fill is Fill.CRITICAL) >= (used >= SPEC.critical)
    assert (fill is not Fill.OK) >= (used >= SPEC.warning)
    assert (fill is Fill.OK) >= (used < SPEC.warning - SLACK)


@given(free, st.sampled_from(Fill))
def test_what_stays_as_it_is_is_told_once(free: int, before: Fill) -> None:
    fill = fill_of(SPEC, CAPACITY, free, before)
    assert fill_of(SPEC, CAPACITY, free, fill) is fill


@given(st.integers(-100, 100), st.sampled_from((0.8, 0.95)))
def test_going_up_and_down_around_a_threshold_is_told_once(wobble: int, at: float) -> None:
    there = round(CAPACITY * (1 - at))
    fill = fill_of(SPEC, CAPACITY, there)
    assert fill is not Fill.OK
    assert fill_of(SPEC, CAPACITY, there + wobble, fill) is fill


def test_an_empty_one_is_not_full() -> None:
    assert fill_of(SPEC, 0, 0) is Fill.OK


@pytest.mark.parametrize("pair", [(0, 0.5), (0.9, 0.8), (0.5, 1.1), (-1, 2)])
def test_thresholds_that_make_no_sense(pair: tuple[float, float]) -> None:
    with pytest.raises(InvalidError):
        check_thresholds(*pair)
