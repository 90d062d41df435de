"""What a benchmark hands back: measured series, and the figures made of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum


class Unit(Enum):
    """What values are measured in, and how they are written."""

    SECONDS = "s"
    BYTES = "B"
    RATE = "/s"
    SHARE = "%"

    def text(self, value: float) -> str:
        """A value for people."""
        match self:
            case Unit.SECONDS:
                return _seconds(value)
            case Unit.BYTES:
                return f"{value / 1e6:.1f} MB"
            case Unit.RATE:
                return f"{value:,.0f}/s"
            case Unit.SHARE:
                return f"{value * 100:.1f} %"


def _seconds(value: float) -> str:
    if abs(value) >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if abs(value) >= 1e-3 else f"{value * 1e6:.0f} µs"


@dataclass(frozen=True)
class Series:
    """The values that one side gave, in the order they were measured."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def text(self, unit: Unit) -> str:
        """Median, and in which range the others lie."""
        if len(self.values) == 1:
            return unit.text(self.median)
        low, high = unit.text(min(self.values)), unit.text(max(self.values))
        return f"{unit.text(self.median)} ({low} – {high}; {len(self.values)})"


@dataclass(frozen=True)
class Figure:
    """One row of the report.

    ``reached`` None: there is nothing to reach, it is told for its own sake.
    """

    what: str
    must: str
    ours: Series
    unit: Unit
    reached: bool | None
    peer: Series | None = None

    @property
    def ratio(self) -> float | None:
        """Ours to the peer's."""
        if self.peer is None or self.peer.median == 0:
            return None
        return self.ours.median / self.peer.median


@dataclass(frozen=True)
class Section:
    """One benchmark's part of the report.

    ``peer`` names the other side; ``method`` is a sentence on how it was measured; ``notes`` are
    paragraphs or tables of Markdown that follow the figures.
    """

    name: str
    title: str
    method: str
    figures: Sequence[Figure]
    peer: str = "peer"
    notes: Sequence[str] = field(default_factory=tuple)


def alternate(
    runs: int, sides: Mapping[str, Callable[[], float]], warm_up: int = 1
) -> dict[str, Series]:
    """Measures several sides in turn (A B A B …), so that whatever else the machine does meets
    all of them alike. The first ``warm_up`` rounds do not count."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-warm_up, runs):
        for name, measure in sides.items():
            value = measure()
            if number >= 0:
                values[name].append(value)
    return {name: Series(tuple(found)) for name, found in values.items()}
