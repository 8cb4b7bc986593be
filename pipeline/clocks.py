"""Clocks that disagree: noticed, so that an age which is wrong by them is not taken for freshness.

Nothing in the index goes by a clock: versions are offsets. But freshness is a worker's clock less Kafka's timestamp,
which was a producer's clock, or the broker's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

__all__ = ["TOLERANCE", "Early", "ahead", "apart", "clock_notes"]

TOLERANCE = 1.0
"""Seconds by which clocks may differ: those that are looked after stay far below."""
_RECENT = 60.0


class Early:
    """Records that a worker applied before they were written, by its clock. Not thread-safe: one owner."""

    def __init__(self) -> None:
        self.count = 0
        self._worst = 0.0
        self._at = float("-inf")

    def sift(self, ages: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The ages, milliseconds (n,), that may be believed, none of them negative; the others are counted here.

        An age that is negative by less than `TOLERANCE` is 0.
        """
        early = ages < -1e3 * TOLERANCE
        if early.any():
            worst = -float(ages.min())
            self._worst = max(worst, self.skew)
            self._at = time.monotonic()
            self.count += int(early.sum())
            ages = ages[~early]
        return np.maximum(ages, 0.0)

    @property
    def skew(self) -> float:
        """By how many milliseconds, at least, clocks differed lately; 0 where nothing was early for a minute."""
        return self._worst if time.monotonic() - self._at < _RECENT else 0.0


def ahead(clock: float, asked: float, answered: float) -> float:
    """By how many seconds, at least, a clock that was read between two moments of one's own is ahead of one's own."""
    return max(clock - answered, 0.0) + min(clock - asked, 0.0)


def apart(clocks: Mapping[str, float]) -> dict[str, float]:
    """By how many seconds each clock is ahead of what most say, of those that are off by more than `TOLERANCE`.

    Parameters
    ----------
    clocks : mapping of str to float
        Seconds ahead of the asking client's own, which is "" and counts with the others.
    """
    known = {"": 0.0, **clocks}
    most = statistics.median(known.values()) if len(known) > 2 else 0.0  # of two, one's own is believed
    return {whose: ahead - most for whose, ahead in known.items() if abs(ahead - most) > TOLERANCE}


def clock_notes(clocks: Mapping[str, float], early: Mapping[str, float]) -> list[str]:
    """What a person should know of the clocks.

    Parameters
    ----------
    early : mapping of str to float
        Worker to `Early.skew`, milliseconds.
    """
    off = apart(clocks)
    notes = [
        f"the clock of {whose or 'this client'} is {abs(by):.1f} s {'ahead of' if by > 0 else 'behind'} the others: "
        "freshness is wrong by as much; set it (NTP). The order of writes does not depend on it"
        for whose, by in sorted(off.items())
    ]
    notes += [
        f"by the clock of {worker}, records were applied up to {skew / 1e3:.1f} s before they were written: its clock "
        "or the producers' is wrong, and these ages are left out of freshness; set them (NTP)"
        for worker, skew in sorted(early.items())
        if skew and worker not in off
    ]
    return notes
