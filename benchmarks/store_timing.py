"""Timing several things so that they can be compared on a machine that others use too."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence

from benchmarks.report import spread

__all__ = ["ROUND_SECONDS", "alternate", "middle", "rates", "ratios"]

ROUND_SECONDS = 0.3
"""What one round of a comparison lasts at least: shorter ones measure the clock and whoever else woke up."""


def alternate(
    calls: Sequence[Callable[[], object]], rounds: int, *, least_seconds: float = ROUND_SECONDS
) -> list[list[float]]:
    """Seconds that one call of each takes, in `rounds` rounds: the first to the last, then the last to the first.

    A machine that grows slower or faster meanwhile does so for all of them. One call of each comes before, to warm up;
    it also says how many of its kind make a round long enough to be timed.
    """
    times = [max(1, math.ceil(least_seconds / max(_seconds(call, 1), 1e-6))) for call in calls]
    found: list[list[float]] = [[] for _ in calls]
    for turn in range(rounds):
        for at in range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls))):
            found[at].append(_seconds(calls[at], times[at]))
    return found


def ratios(ours: Sequence[float], raw: Sequence[float]) -> dict[str, float | None]:
    """Raw seconds through ours, pair by pair: 1 is as fast as the raw library, more is faster. Median and spread."""
    return spread(theirs / own for own, theirs in zip(ours, raw, strict=True))


def rates(seconds: Sequence[float], things: int) -> dict[str, float | None]:
    """Things per second, median and spread."""
    return spread(things / one for one in seconds)


def middle(values: Sequence[float]) -> float:
    """The median of what there is, of nothing 0."""
    return statistics.median(values) if values else 0.0


def _seconds(call: Callable[[], object], calls: int) -> float:
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls
