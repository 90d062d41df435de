"""What benchmarks report: the right sides in turn, and nothing missed is hidden."""

from __future__ import annotations

from bench.figures import Figure, Section, Series, Unit, alternate
from bench.report import render, text


def test_sides_are_measured_in_turn_and_the_first_round_does_not_count():
    calls: list[str] = []

    def side(name: str, values: list[float]):
        def measure() -> float:
            calls.append(name)
            return values[calls.count(name) - 1]

        return measure

    found = alternate(2, {"a": side("a", [9.0, 1.0, 2.0]), "b": side("b", [8.0, 3.0, 5.0])})

    assert calls == ["a", "b"] * 3
    assert found == {"a": Series((1.0, 2.0)), "b": Series((3.0, 5.0))}


def figure(what: str, reached: bool | None) -> Figure:
    return Figure(what, "≤ 2 s", Series((3.0, 1.0, 2.0)), Unit.SECONDS, reached, Series((4.0,)))


def test_a_row_tells_both_sides_the_ratio_and_the_outcome():
    section = Section("known", "Known", "A sentence.", [figure("thing", True)], "libvirt")

    lines = text(section).splitlines()

    assert lines[0] == "## Known"
    assert "| what | must reach | Undercroft | libvirt | ratio | reached |" in lines
    row = "| thing | ≤ 2 s | 2.00 s (1.00 s – 3.00 s; 3) | 4.00 s | 0.50 | yes |"
    assert row in lines
    assert lines[-1] == "Repeat: `script/bench known`"


def test_the_report_begins_with_what_was_missed():
    figures = [figure("good", True), figure("bad", False), figure("told", None)]
    sections = [Section("x", "X", "How.", figures)]

    report = render(sections, ["Machine: one"])

    assert "1 of 2 figures reached. Missed: bad." in report
    assert "| bad | ≤ 2 s | 2.00 s (1.00 s – 3.00 s; 3) | 4.00 s | 0.50 | **no** |" in report


def test_values_are_written_in_units_that_suit_them():
    assert Unit.SECONDS.text(1.5) == "1.50 s"
    assert Unit.SECONDS.text(0.0123) == "12.3 ms"
    assert Unit.SECONDS.text(0.0000123) == "12 µs"
    assert Unit.BYTES.text(64_000_000) == "64.0 MB"
    assert Unit.RATE.text(4484.4) == "4,484/s"
    assert Unit.SHARE.text(0.037) == "3.7 %"
