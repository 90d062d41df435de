"""Tables, colours and what must not reach a terminal."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undercroft.cli.output import Style, Table, dig, display_width, elapsed, plain, shorten


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def style(tty: bool = False, **environ: str) -> Style:
    return Style(Terminal() if tty else io.StringIO(), {"TERM": "xterm", **environ})


class Narrow(Style):
    width = 30


def test_columns_are_as_wide_as_their_content():
    table = Table(style(), ("NAME", "STATE", ">CPUS"))
    table.add("a", "running", "2")
    table.add("longer", "stopped", "16")
    assert table.render().splitlines() == [
        "NAME    STATE    CPUS",
        "a       running     2",
        "longer  stopped    16",
    ]


def test_a_column_without_content_is_left_out_and_a_gap_is_marked():
    table = Table(style(), ("NAME", "A", "B"))
    table.add("x", "", "")
    table.add("y", "", "1")
    assert table.render().splitlines() == ["NAME  B", "x     -", "y     1"]


def test_without_rows_only_the_heading():
    assert Table(style(), ("NAME", "STATE")).render() == "NAME\n"


def test_a_table_fits_the_terminal():
    table = Table(Narrow(Terminal(), {}), ("NAME", "WHAT"))
    table.add("short", "x" * 100)
    lines = table.render().splitlines()
    assert max(map(display_width, lines)) == 30
    assert lines[1].endswith("…")


def test_wide_characters_keep_columns_straight():
    table = Table(style(), ("NAME", "B"))
    table.add("日本", "1")
    table.add("abcd", "2")
    assert table.render().splitlines()[1:] == ["日本  1", "abcd  2"]


def test_states_have_colours_only_where_there_is_colour():
    assert style(tty=True).state("running") == "\x1b[32mrunning\x1b[0m"
    assert style(tty=True, NO_COLOR="1").state("running") == "running"
    assert style(tty=True, TERM="dumb").state("running") == "running"
    assert style().state("running") == "running"
    assert style(FORCE_COLOR="1").state("running") == "\x1b[32mrunning\x1b[0m"
    table = Table(style(tty=True), ("NAME", "STATE", "X"))
    table.add("a", "failed", "1")
    table.add("b", "suspended", "2")
    assert "\x1b[31mfailed\x1b[0m     1" in table.render()


@given(st.text())
def test_whatever_others_wrote_cannot_move_the_cursor(text):
    assert style().clean(text).isprintable()
    table = Table(style(), ("NAME",))
    table.add(text)
    assert all(line.isprintable() for line in table.render().split("\n"))


@given(st.text(), st.integers(1, 20))
def test_shortened_text_fits(text, width):
    assert display_width(shorten(text, width)) <= width


def test_dig():
    record = {"a": {"b": [1]}, "n": None}
    assert dig(record, "a.b") == [1]
    assert dig(record, "n.b", 7) == 7
    assert dig(record, "a.x.y") is None
    assert dig([], "a", 1) == 1


@pytest.mark.parametrize(
    ("value", "text"), [(None, ""), ("x", "x"), (3, "3"), (["a"], '["a"]'), (True, "true")]
)
def test_plain(value, text):
    assert plain(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.314, "0.31 s"), (23.44, "23.4 s"), (200, "3m 20s")]
)
def test_elapsed(seconds, text):
    assert elapsed(seconds) == text


def test_a_single_cell_has_a_colour_and_what_others_wrote_has_none():
    table = Table(style(tty=True), ("NAME", "", ">FULL"))
    table.add("a\x1b[31m", "", "5%")
    table.add("b", "", "90%", paint={"FULL": "red"})
    lines = table.render().splitlines()
    assert lines[1:] == ["a?[31m    5%", "b        \x1b[31m90%\x1b[0m"]
