"""Disks of which it is known where everything is, copied into a qcow2 of our own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from undercroft.storage.files import require_space
from undercroft.storage.formats.common import refuse
from undercroft.storage.streams.maps import Span
from undercroft.storage.streams.qcow2_out import CLUSTER, Qcow2Writer
from undercroft.storage.threads import Stop

__all__ = ["copy_spans"]

_WINDOW = 16 * CLUSTER  # bytes of disk that are read at once
_CHECK_EVERY = 64 << 20  # bytes written between two looks at the room left
_EMPTY = bytes(CLUSTER)
_STRIDE = 4099


def copy_spans(
    source: int,
    spans: Iterator[Span],
    size: int,
    target: int,
    directory: Path,
    stop: Stop,
    report: Callable[[float], None],
) -> None:
    """Writes a disk of ``size`` bytes, whose pieces are in the file ``source``, as a qcow2 to the
    descriptor ``target``, a new file in ``directory``.

    Raises:
        HostileImageError: the file became shorter; and see `undercroft.storage.streams.maps`.
        NoSpaceError: there is no room. OSError: it cannot be read or written.
    """
    writer = Qcow2Writer(target, size)
    checked = 0
    # One thread: what is read here comes from memory mostly, and handing it over costs more.
    data = bytearray(_WINDOW)
    view = memoryview(data)
    os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    for window in _windows(spans, size):
        stop.check()
        at = window[0].start // _WINDOW * _WINDOW
        _fill(source, window, at, view)
        last = window[-1].start + window[-1].length - at
        first = (window[0].start - at) // CLUSTER
        clusters = [
            (at // CLUSTER + index, view[index * CLUSTER : (index + 1) * CLUSTER])
            for index in range(first, -(-last // CLUSTER))
            if not _is_empty(data, index * CLUSTER)
        ]
        if clusters:
            writer.write(clusters)
        report((at + last) / size)
        if writer.length - checked >= _CHECK_EVERY:
            require_space("importing the disk", directory, 0)
            checked = writer.length
    writer.finish()


def _windows(spans: Iterator[Span], size: int) -> Iterator[list[Span]]:
    """The spans, cut at windows of the disk and joined where they lie side by side."""
    window: list[Span] = []
    for span in spans:
        start, offset = span.start, span.offset
        end = min(span.start + span.length, size)
        while start < end:
            length = min(end, (start // _WINDOW + 1) * _WINDOW) - start
            if window and start // _WINDOW != window[0].start // _WINDOW:
                yield window
                window = []
            last = window[-1] if window else None
            if last is not None and (last.start + last.length, last.offset + last.length) == (
                start,
                offset,
            ):
                window[-1] = Span(last.start, last.length + length, last.offset)
            else:
                window.append(Span(start, length, offset))
            start, offset = start + length, offset + length
    if window:
        yield window


def _fill(source: int, window: list[Span], begin: int, view: memoryview) -> None:
    """Reads a window, which begins at ``begin``; what no span has is zero."""
    done = 0
    for span in window:
        at = span.start - begin
        if at > done:
            view[done:at] = bytes(at - done)
        done, offset = at + span.length, span.offset
        while at < done:
            got = os.preadv(source, [view[at:done]], offset)
            if got == 0:
                raise refuse("it became shorter while it was read")
            at, offset = at + got, offset + got
    end = -(-done // CLUSTER) * CLUSTER
    view[done:end] = bytes(end - done)


def _is_empty(data: bytearray, at: int) -> bool:
    """Whether a cluster is zero: mostly a few bytes of it tell that it is not."""
    return not any(data[at : at + CLUSTER : _STRIDE]) and data[at : at + CLUSTER] == _EMPTY
