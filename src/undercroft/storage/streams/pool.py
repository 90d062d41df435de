"""Work shared among threads, its results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["in_order"]

T = TypeVar("T")
R = TypeVar("R")
_MOST = 8  # threads of one disk: others want to do something too
_AHEAD = 3  # pieces of work in waiting for each


def in_order(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """What the work makes of each item, in their order. A few are under way at once, so memory is
    bounded; what fails is raised in its turn. Close the iterator to end early."""
    threads = min(os.cpu_count() or 1, _MOST)
    with ThreadPoolExecutor(threads, thread_name_prefix="stream") as pool:
        under_way: deque[Future[R]] = deque()
        try:
            for item in items:
                under_way.append(pool.submit(work, item))
                if len(under_way) > threads * _AHEAD:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()
