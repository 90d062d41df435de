"""Showing how far a transfer of ours is."""

from __future__ import annotations

import time
from contextlib import contextmanager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress

    from undercroft.cli.context import Croft

_PATIENCE = 0.5  # seconds before a bar appears


@contextmanager
def shown(
    croft: Croft, title: str, length: int | None, before: int = 0
) -> Iterator[Callable[[Iterable[bytes]], Iterator[bytes]]]:
    """Gives a function that passes pieces on and counts their bytes on a progress bar; ``length``
    in bytes, None where it is not known; ``before``: how many were there already. There is only a
    bar on a terminal."""
    bar: Progress | None = None

    def count(pieces: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal bar
        begun, done = time.monotonic(), before
        for piece in pieces:
            yield piece
            done += len(piece)
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
            elif croft.err.tty and not croft.quiet and time.monotonic() - begun > _PATIENCE:
                bar = _bar(croft)
                bar.add_task(title, total=length, completed=done)
                bar.start()

    try:
        yield count
    finally:
        if bar is not None:
            bar.stop()


def _bar(croft: Croft) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, no_color=not croft.err.color, highlight=False),
        transient=True,
    )
