"""How old frames are when they have been tracked: a distribution in bounded memory, for runs of weeks.

Knows numbers only.
"""

from __future__ import annotations

import bisect
import threading
from collections import deque
from dataclasses import dataclass

# 0.1 ms to 100 s in steps of 4 %: a quantile is off by 2 % at most.
_STEP = 1.04
_BOUNDS = tuple(0.0001 * _STEP**k for k in range(354))
RECENT = 240


@dataclass(frozen=True, slots=True)
class Quantiles:
    """In milliseconds; of nothing, all 0."""

    count: int = 0
    p50: float = 0.0
    p95: float = 0.0
    p99: float = 0.0
    worst: float = 0.0


class Ages:
    """Counts ages by size. One thread adds, any may ask."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_BOUNDS) + 1)
        self._count = 0
        self._total = self._worst = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT)
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect.bisect_left(_BOUNDS, seconds)] += 1
            self._count += 1
            self._total += seconds
            self._worst = max(self._worst, seconds)
            self._recent.append(seconds)

    def merge(self, other: Ages) -> None:
        """Everything that `other` holds, too."""
        counts, count, total, worst = other.snapshot()
        with self._lock:
            self._counts = [mine + theirs for mine, theirs in zip(self._counts, counts, strict=True)]
            self._count += count
            self._total += total
            self._worst = max(self._worst, worst)

    def snapshot(self) -> tuple[list[int], int, float, float]:
        """Counts by size, how many in all, their sum and the greatest, in seconds."""
        with self._lock:
            return list(self._counts), self._count, self._total, self._worst

    def recent(self) -> list[float]:
        """The last RECENT ages in seconds, oldest first."""
        with self._lock:
            return list(self._recent)

    def at_most(self, bounds: list[float]) -> list[int]:
        """How many were no greater than each bound, as Prometheus' histograms want it (to within 4 %)."""
        counts = self.snapshot()[0]
        return [sum(counts[: bisect.bisect_right(_BOUNDS, bound)]) for bound in bounds]

    def quantiles(self) -> Quantiles:
        counts, count, _, worst = self.snapshot()
        if not count:
            return Quantiles()
        found: list[float] = []
        for share in (0.50, 0.95, 0.99):
            rank, seen = share * count, 0
            for k, here in enumerate(counts):
                seen += here
                if seen >= rank:
                    middle = _BOUNDS[min(k, len(_BOUNDS) - 1)] / _STEP**0.5
                    found.append(round(1000 * min(middle, worst), 3))
                    break
        p50, p95, p99 = found
        return Quantiles(count, p50, p95, p99, round(1000 * worst, 3))
