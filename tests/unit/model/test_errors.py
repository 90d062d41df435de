"""The error tree: stable codes, and errors that survive the wire."""

import re

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.model import errors
from undercroft.model.errors import (
    NotFoundError,
    Problem,
    UndercroftError,
    error_classes,
    error_from_problem,
)

CLASSES = error_classes()


def test_every_class_is_exported_and_drawn_in_the_tree() -> None:
    for code, cls in CLASSES.items():
        assert cls.__name__ in errors.__all__
        line = rf"{cls.__name__}\s+{code}\s+{cls.status}\b"
        assert re.search(line, errors.__doc__ or ""), f"{cls.__name__} is not drawn as it is"


def test_codes_are_one_per_class() -> None:
    assert len(set(CLASSES.values())) == len(CLASSES)
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", code) for code in CLASSES)


def test_two_classes_of_one_code_are_noticed() -> None:
    class TwinError(NotFoundError):
        pass

    try:
        with pytest.raises(RuntimeError, match="not-found is claimed twice"):
            error_classes()
    finally:
        TwinError.code = "twin-of-a-test"
        del TwinError
        import gc

        gc.collect()


@pytest.mark.parametrize("code", sorted(CLASSES))
def test_a_problem_becomes_the_same_error_again(code: str) -> None:
    error = CLASSES[code]("it broke", object="vm web1", action="mend it", state="x", n=3)
    wire = msgspec.json.encode(error.problem())
    again = error_from_problem(msgspec.json.decode(wire, type=Problem))
    assert type(again) is CLASSES[code]
    assert (again.message, again.object, again.action, again.data) == (
        "it broke",
        "vm web1",
        "mend it",
        {"state": "x", "n": 3},
    )
    assert again.problem() == error.problem()


def test_an_unknown_code_is_kept() -> None:
    problem = Problem(title="Odd", status=418, code="teapot", detail="short and stout")
    error = error_from_problem(problem)
    assert type(error) is UndercroftError
    assert (error.code, error.status, error.title) == ("teapot", 418, "Odd")
    assert UndercroftError.code == "internal"


@given(st.dictionaries(st.text() | st.sampled_from(["message", "object", "self"]), st.integers()))
def test_whatever_data_came_over_the_wire_is_kept(data: dict[str, int]) -> None:
    problem = Problem(title="t", status=404, code="not-found", detail="d", data=data)
    assert error_from_problem(problem).data == data
