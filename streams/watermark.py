"""Which offsets have been applied, and how far may be committed.

Kafka delivers in order, but batches finish in any order, twice, or after a copy from a peer has overtaken them. So a
topic partition's applied offsets are a set, and the watermark is the first offset that is not in it. Offsets begin
wherever the log begins, which after truncation is above zero.
"""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping

__all__ = ["Intervals", "OffsetTracker", "Watermark"]


class Intervals:
    """A set of whole numbers, kept as sorted, disjoint, non-touching half-open intervals ``[low, high)``.

    Not thread-safe: one owner, or the owner's lock.
    """

    __slots__ = ("_highs", "_lows")

    def __init__(self, pieces: Iterable[tuple[int, int]] = ()) -> None:
        self._lows: list[int] = []
        self._highs: list[int] = []
        for low, high in pieces:
            self.add(low, high)

    def add(self, low: int, high: int) -> None:
        """Put ``low <= n < high`` into the set; what is there already changes nothing. An empty range adds nothing."""
        if high <= low:
            return
        # Touching intervals are joined too (hence left of highs and right of lows), or the list would grow for ever.
        first = bisect_left(self._highs, low)
        last = bisect_right(self._lows, high)
        if first < last:
            low = min(low, self._lows[first])
            high = max(high, self._highs[last - 1])
        self._lows[first:last] = [low]
        self._highs[first:last] = [high]

    def covers(self, low: int, high: int) -> bool:
        """True if every number of ``[low, high)`` is in the set; an empty range always is."""
        if high <= low:
            return True
        at = bisect_right(self._lows, low) - 1
        return at >= 0 and self._highs[at] >= high

    def reach(self, number: int) -> int:
        """Where the stretch that ``number`` is joined to ends (at least `number`)."""
        last = bisect_right(self._lows, number)
        return max(number, self._highs[last - 1]) if last else number

    def take_below(self, number: int) -> int:
        """Forget everything that is joined to ``number`` from below, and return what `reach` does."""
        last = bisect_right(self._lows, number)
        end = self.reach(number)
        del self._lows[:last]
        del self._highs[:last]
        return end

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """The intervals, lowest first."""
        return list(zip(self._lows, self._highs, strict=True))

    def __len__(self) -> int:
        return len(self._lows)

    def __repr__(self) -> str:
        return f"Intervals({self.pieces})"


class Watermark:
    """The applied offsets of one topic partition: all below `value`, and some intervals above it.

    Parameters
    ----------
    start : int
        Everything below counts as applied: where this log, or this copy of it, begins.

    Notes
    -----
    `value` never falls. Not thread-safe: one owner, or the owner's lock.
    """

    __slots__ = ("_above", "_value")

    def __init__(self, start: int = 0) -> None:
        self._value = start
        self._above = Intervals()

    @property
    def value(self) -> int:
        """The first offset that has not been applied."""
        return self._value

    @property
    def above(self) -> list[tuple[int, int]]:
        """What has been applied beyond a hole, lowest first; empty while everything arrives in order."""
        return self._above.pieces

    def add(self, low: int, high: int) -> None:
        """``[low, high)`` has been applied: idempotent, in any order."""
        if low > self._value:
            self._above.add(low, high)
        elif high > self._value:
            self._value = self._above.take_below(high) if len(self._above) else high

    def after(self, low: int, high: int) -> int:
        """What `value` would be once ``[low, high)`` were added."""
        return self._value if low > self._value or high <= self._value else self._above.reach(high)

    def covers(self, low: int, high: int) -> bool:
        """True if every offset of ``[low, high)`` has been applied."""
        return high <= self._value or self._above.covers(max(low, self._value), high)

    def raise_to(self, offset: int) -> None:
        """Everything below `offset` counts as applied, holes too: the log begins there now, or a peer gave the rest."""
        self.add(self._value, offset)

    def __repr__(self) -> str:
        return f"Watermark({self._value}, above={self.above})"


class OffsetTracker:
    """What may be committed to Kafka while several batches are under way and finish in any order.

    A topic partition's committable offset is the first one that is not done: it stops at a hole and at the lowest
    unfinished batch, and it only rises. Thread-safe: batches begin on the consumer's thread, finish on the event loop.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens = itertools.count()
        self._open: dict[int, dict[int, tuple[int, int]]] = {}
        self._done: dict[int, Watermark] = {}
        self._told: dict[int, int] = {}

    def start(self, topic_partition: int, offset: int) -> None:
        """Reading of `topic_partition` begins at `offset`; what was known of it before is forgotten."""
        with self._lock:
            self._forget(topic_partition)
            self._done[topic_partition] = Watermark(offset)
            self._told[topic_partition] = offset

    def begin(self, ranges: Mapping[int, tuple[int, int]]) -> int:
        """A batch that accounts for ``[low, high)`` of each topic partition is under way.

        A topic partition that was not `start`-ed starts at its first batch's `low`.

        Returns
        -------
        int
            The token for `done`.
        """
        with self._lock:
            token = next(self._tokens)
            self._open[token] = dict(ranges)
            for topic_partition, (low, _) in ranges.items():
                if topic_partition not in self._done:
                    self._done[topic_partition] = Watermark(low)
                    self._told[topic_partition] = low
            return token

    def done(self, token: int) -> dict[int, int]:
        """The batch has been applied everywhere.

        Returns
        -------
        dict of int to int
            Topic partition to committable offset, where it has risen. A token that is unknown, was done before
            or whose topic partitions have been dropped since raises nothing: its offsets are someone else's now.
        """
        with self._lock:
            ranges = self._open.pop(token, {})
            for topic_partition, (low, high) in ranges.items():
                self._done[topic_partition].add(low, high)
            return self._risen(ranges)

    def raise_to(self, topic_partition: int, offset: int) -> dict[int, int]:
        """The log has lost, or never had, what lies below `offset`: those offsets count as done. Returns as `done`."""
        with self._lock:
            self._done.setdefault(topic_partition, Watermark(offset)).raise_to(offset)
            for ranges in self._open.values():
                low, high = ranges.get(topic_partition, (0, 0))
                if low < offset and topic_partition in ranges:
                    ranges[topic_partition] = (offset, max(offset, high))
            return self._risen((topic_partition,))

    def drop(self, topic_partitions: Iterable[int]) -> None:
        """These have gone to another worker: batches still under way no longer move their offsets."""
        with self._lock:
            for topic_partition in topic_partitions:
                self._forget(topic_partition)

    @property
    def under_way(self) -> int:
        """Batches that have begun and are not done."""
        with self._lock:
            return len(self._open)

    def _forget(self, topic_partition: int) -> None:
        self._done.pop(topic_partition, None)
        self._told.pop(topic_partition, None)
        for ranges in self._open.values():
            ranges.pop(topic_partition, None)

    def _risen(self, topic_partitions: Iterable[int]) -> dict[int, int]:
        risen = {}
        for topic_partition in topic_partitions:
            offset = self._done[topic_partition].value
            # A batch delivered again below the watermark is not done until it is applied again: do not commit past it.
            for ranges in self._open.values():
                if topic_partition in ranges and ranges[topic_partition][1] > ranges[topic_partition][0]:
                    offset = min(offset, ranges[topic_partition][0])
            if offset > self._told.get(topic_partition, -1):
                self._told[topic_partition] = offset
                risen[topic_partition] = offset
        return risen
