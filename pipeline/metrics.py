"""Counting durations so that percentiles of every record can be told later, and added up over workers.

A histogram with logarithmic buckets (2 % wide), as HdrHistogram keeps: memory does not grow with what is counted, and a
percentile is right to 2 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["Histogram"]

_WIDTH = math.log(1.02)
_LEAST = 0.001


class Histogram:
    """Milliseconds, counted. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self.count = 0
        self.max = 0.0

    def add(self, milliseconds: float, times: int = 1) -> None:
        bucket = math.floor(math.log(max(milliseconds, _LEAST)) / _WIDTH)
        self._counts[bucket] = self._counts.get(bucket, 0) + times
        self.count += times
        self.max = max(self.max, milliseconds)

    def add_many(self, milliseconds: npt.NDArray[np.float64]) -> None:
        values, counts = np.unique(milliseconds, return_counts=True)
        for value, times in zip(values.tolist(), counts.tolist(), strict=True):
            self.add(value, times)

    def percentile(self, share: float) -> float:
        """The value that `share` (0 to 1) of all do not exceed; 0 if nothing was counted."""
        wanted, seen = share * self.count, 0
        for bucket in sorted(self._counts):
            seen += self._counts[bucket]
            if seen >= wanted:
                return min(math.exp((bucket + 1) * _WIDTH), self.max)
        return 0.0

    def summary(self) -> dict[str, float]:
        return {
            **{
                f"p{name}": round(self.percentile(share), 3)
                for name, share in (("50", 0.5), ("95", 0.95), ("99", 0.99))
            },
            "max": round(self.max, 3),
            "count": self.count,
        }

    def to_wire(self) -> list[object]:
        return [self.max, [list(pair) for pair in self._counts.items()]]

    @classmethod
    def sum(cls, wires: Iterable[Sequence[object]]) -> Histogram:
        """One histogram of several, as `to_wire` gave them."""
        total = cls()
        for largest, counts in wires:
            total.max = max(total.max, float(largest))  # type: ignore[arg-type]
            for bucket, times in counts:  # type: ignore[attr-defined]
                total._counts[bucket] = total._counts.get(bucket, 0) + times
                total.count += times
        return total
