"""What the API measures of itself. Cheap: a few dictionary look-ups per request."""

from __future__ import annotations

from bisect import bisect_left

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # seconds
MAX_SERIES = 2048  # far above routes times statuses


class Statistics:
    """Counts by route, never by path, so that they stay few whatever callers ask for."""

    __slots__ = ("latency", "open_streams", "requests")

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, int], int] = {}  # method, route, status
        self.latency: dict[tuple[str, str], Histogram] = {}  # method, route
        self.open_streams = 0

    def count(self, method: str, route: str, status: int, seconds: float | None) -> None:
        """Notes a request that was answered; ``seconds`` None: its length tells nothing."""
        key = (method, route, status)
        if key in self.requests or len(self.requests) < MAX_SERIES:
            self.requests[key] = self.requests.get(key, 0) + 1
        if seconds is not None:
            histogram = self.latency.get((method, route))
            if histogram is None:
                if len(self.latency) >= MAX_SERIES:
                    return
                histogram = self.latency[(method, route)] = Histogram()
            histogram.add(seconds)


class Histogram:
    """How long requests took, in seconds."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Notes one."""
        self.counts[bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds
