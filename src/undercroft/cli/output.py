"""Text for terminals: tables, colours, sizes and times. No library, because every command waits
for it."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, TextIO

_SGR = {
    "bold": "1",
    "dim": "2",
    "red": "31",
    "green": "32",
    "yellow": "33",
    "blue": "34",
    "magenta": "35",
    "cyan": "36",
}
_STATES = {
    "running": "green",
    "ready": "green",
    "succeeded": "green",
    "paused": "yellow",
    "suspended": "yellow",
    "cancelled": "yellow",
    "stopped": "dim",
    "failed": "red",
    "warning": "yellow",
    "error": "red",
    "info": "dim",
}
DEFAULT_WIDTH = 80
GAP = "  "


class Style:
    """How text looks on one stream: whether it has colour, how wide it is, what it can show."""

    def __init__(self, stream: TextIO, environ: Mapping[str, str], color: bool = True) -> None:
        self.stream = stream
        self.tty = _isatty(stream)
        self.color = color and wants_color(self.tty, environ)
        self.unicode = "utf" in (getattr(stream, "encoding", None) or "").lower()
        self.arrow = "→" if self.unicode else "->"

    @property
    def width(self) -> int | None:
        """Columns of the terminal; None where there is none."""
        if not self.tty:
            return None
        try:
            return os.get_terminal_size(self.stream.fileno()).columns or DEFAULT_WIDTH
        except (OSError, ValueError):
            return DEFAULT_WIDTH

    def paint(self, text: str, *styles: str) -> str:
        """The text in the given styles, where there is colour."""
        if not self.color or not styles or not text:
            return text
        return f"\x1b[{';'.join(_SGR[style] for style in styles)}m{text}\x1b[0m"

    def state(self, state: str) -> str:
        """A state in its colour."""
        return self.paint(state, _STATES.get(state, "cyan"))

    def clean(self, text: str, keep: str = "") -> str:
        """Text that others wrote (guests, servers), unable to move the cursor or worse."""
        if text.isprintable():
            return text
        return "".join(c if c.isprintable() or c in keep else "?" for c in text)


def wants_color(tty: bool, environ: Mapping[str, str]) -> bool:
    """Whether output shall have colour (https://no-color.org, https://force-color.org)."""
    if environ.get("NO_COLOR"):
        return False
    if environ.get("FORCE_COLOR"):
        return True
    return tty and environ.get("TERM", "dumb") != "dumb"


def _isatty(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def display_width(text: str) -> int:
    """Columns that a text takes: East Asian characters take two, combining ones none."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def shorten(text: str, width: int) -> str:
    """The text cut to ``width`` columns, with an ellipsis where something is missing."""
    if display_width(text) <= width:
        return text
    while text and display_width(text) > width - 1:
        text = text[:-1]
    return text + "…" if width > 0 else ""


class Table:
    """Columns of text, as wide as they need to be; on a terminal the last one that may be cut is.

    ``columns`` are headings; one that begins with ``>`` is aligned to the right. ``styled`` names
    the column whose cells are states.
    """

    def __init__(self, style: Style, columns: Sequence[str], *, state: str = "STATE") -> None:
        self._style = style
        self._right = [name.startswith(">") for name in columns]
        self._names = [name.lstrip(">") for name in columns]
        self._state = self._names.index(state) if state in self._names else -1
        self._rows: list[tuple[str, ...]] = []
        self._paint: dict[tuple[int, int], str] = {}

    def add(self, *cells: str, paint: Mapping[str, str] | None = None) -> None:
        """Adds a row. ``paint`` has the styles of single cells, by heading: a cell itself is text
        that others may have written, so colour in it would not be shown."""
        for name, style in (paint or {}).items():
            self._paint[len(self._rows), self._names.index(name)] = style
        if not "".join(cells).isprintable():
            cells = tuple(self._style.clean(cell) for cell in cells)
        self._rows.append(cells)

    def render(self) -> str:
        """The whole table, with a line break at the end; columns without content are left out."""
        columns: list[tuple[str, ...]] = list(zip(*self._rows, strict=True))
        columns = columns or [()] * len(self._names)
        filled = [i for i, cells in enumerate(columns) if i == 0 or any(cells)]
        names = [self._names[i] for i in filled]
        right = [self._right[i] for i in filled]
        state = filled.index(self._state) if self._state in filled else -1
        shown = [[cell or "-" for cell in columns[i]] for i in filled]
        widths = [
            max(map(display_width, [name, *cells]))
            for name, cells in zip(names, shown, strict=True)
        ]
        narrow = widths.copy()
        self._fit(narrow, names)
        padded = [
            _pad(cells, width, right[i], narrow[i] < widths[i])
            for i, (cells, width) in enumerate(zip(shown, narrow, strict=True))
        ]
        if state >= 0 and self._style.color:
            painted = {text: self._style.state(text.rstrip()) for text in set(padded[state])}
            padded[state] = [
                painted[text] + " " * (len(text) - len(text.rstrip())) for text in padded[state]
            ]
        for (row, column), name in self._paint.items():
            cell = padded[filled.index(column)][row]
            text = cell.strip()
            padded[filled.index(column)][row] = cell.replace(text, self._style.paint(text, name))
        head = GAP.join(
            _pad([name], width, right[i], True)[0]
            for i, (name, width) in enumerate(zip(names, narrow, strict=True))
        )
        lines = [self._style.paint(head.rstrip(), "bold")]
        lines += [GAP.join(cells).rstrip() for cells in zip(*padded, strict=True)]
        return "\n".join(lines) + "\n"

    def _fit(self, widths: list[int], names: list[str]) -> None:
        """Makes the widest columns narrower until the table fits the terminal."""
        total = self._style.width
        if total is None:
            return
        room = total - len(GAP) * (len(widths) - 1)
        while sum(widths) > room:
            widest = max(range(1, len(widths)), key=lambda i: widths[i], default=0)
            least = max(8, len(names[widest]))
            if widths[widest] <= least:
                return
            widths[widest] = max(least, widths[widest] - (sum(widths) - room))


def _pad(cells: Sequence[str], width: int, right: bool, cut: bool) -> list[str]:
    """The cells, all of one width; ``cut``: some may be too long."""
    if cut:
        cells = [shorten(cell, width) for cell in cells]
    if all(map(str.isascii, cells)):
        return [cell.rjust(width) if right else cell.ljust(width) for cell in cells]
    found = []
    for cell in cells:
        pad = " " * (width - display_width(cell))
        found.append(pad + cell if right else cell + pad)
    return found


def fields(style: Style, pairs: Sequence[tuple[str, str]]) -> str:
    """Names and values below one another; a value may have several lines."""
    width = max((len(name) for name, _ in pairs), default=0)
    lines = []
    for name, value in pairs:
        first, *rest = style.clean(value, keep="\n").split("\n")
        lines.append(f"{style.paint(name.ljust(width), 'dim')}  {first}")
        lines += [f"{'':{width}}  {line}" for line in rest]
    return "\n".join(lines) + "\n"


def dig(record: Any, path: str, default: Any = None) -> Any:
    """What lies at a dotted path in decoded JSON; the default where something is missing."""
    for part in path.split("."):
        if not isinstance(record, dict) or (record := record.get(part)) is None:
            return default
    return record


def plain(value: Any) -> str:
    """A value for scripts: text as it is, nothing for null, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value or ""
    import json

    return json.dumps(value, ensure_ascii=False)


def local_time(seconds: float) -> str:
    """A point in time (seconds since 1970) as the user's clock shows it."""
    import time

    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def ago(seconds: float | None) -> str:
    """How long something has lasted: ``3m 20s``."""
    if seconds is None:
        return ""
    from undercroft.model.units import format_duration

    return format_duration(max(0.0, seconds))


def elapsed(seconds: float) -> str:
    """A measured time: ``0.31 s``, ``23.4 s``, ``3m 20s``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 100 else ago(seconds)


def cpus(count: Any) -> str:
    """A number of CPUs: ``1 CPU``, ``2 CPUs``."""
    return f"{count} CPU" if count == 1 else f"{count} CPUs"


def size(value: int | float | None) -> str:
    """A size in bytes for people."""
    if value is None:
        return ""
    from undercroft.model.units import format_size

    return format_size(int(value))
