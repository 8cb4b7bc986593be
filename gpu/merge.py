"""Which segments should become one: a pure function of their sizes.

Tiered by size, as in Tantivy's `LogMergePolicy` and Lucene's `TieredMergePolicy`, with what a vector store needs and
they do not have: a full growing segment is merged straight into its tier instead of being indexed by itself first, and
a job that would not fit into memory is not planned. Where rows are refused for lack of room, segments are rewritten for
fewer deleted rows than otherwise, what gives back most first.

Ingesting a million rows that are sealed at 16,384 writes each row 2.5 times and leaves 4.4 segments to search on
average. Where an index can take in more rows, what waits for its index is added to one that is there: 1.7 times and 2.2
segments, while each row is copied 7 times, which together takes a thirtieth of writing it once. Simulated over the same
stream, Tantivy's policy writes 1.9 times and leaves 6.9, Lucene's 1.8 and 8.9; Qdrant's (merge the three smallest above
a target, here two) 16.7 and 1.5.
`tests/gpu/test_merge_amplification.py` holds these figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from headrace.gpu.errors import ConfigError

__all__ = ["MergePolicy", "SegmentSize", "base", "make_room", "plan", "settle", "written"]


@dataclass(frozen=True, slots=True)
class SegmentSize:
    """What the policy looks at.

    Attributes
    ----------
    rows, live : int
        Rows written, and those of them that are still alive.
    frozen : bool
        A former growing segment that waits for its index. The order of frozen segments is that of their age.
    job_bytes : int
        What writing its live rows anew takes until the old segment can go.
    held : int
        Bytes that it holds, its deleted rows' included.
    copy_bytes : int
        The same as `job_bytes` where it is extended, with its deleted rows.
    extends : bool
        Its index can be copied with more rows added to it: then only these are written.
    """

    rows: int
    live: int
    frozen: bool = False
    job_bytes: int = 0
    held: int = 0
    copy_bytes: int = 0
    extends: bool = False

    @property
    def dead_share(self) -> float:
        """Deleted rows as a share of all that were written."""
        return (self.rows - self.live) / self.rows if self.rows else 0.0

    @property
    def gain(self) -> float:
        """Bytes given back for each byte of the work that rewriting it takes; where that is none, more than any."""
        return self.held * self.dead_share / self.job_bytes if self.job_bytes else float("inf")


@dataclass(frozen=True, slots=True)
class MergePolicy:
    """When to merge.

    Attributes
    ----------
    fan_in : int
        Segments of one tier at which they become one. Fewer means fewer segments to search and more writing: each row
        is written about 1 + log(rows / seal_rows) / log(fan_in) times.
    tier : float
        Segments belong to one tier while the largest has at most `tier` times the rows of the smallest. With 4 instead
        of 3 a row is written 3.4 times for 3.4 segments on average, because large segments are written again for the
        sake of small ones.
    floor_rows : int
        Smaller segments count as this large, so that they merge however much they differ.
    dead_share : float
        A segment with a larger share of deleted rows is rewritten by itself.
    max_rows : int
        No merge of several segments makes a larger one.
    absorb : float
        What waits for its index is added to a segment that can be extended, where that has at most so many times its
        rows: copying a row with its links takes a hundredth of what finding them does, but it is done for each of
        them. 0: never.
    stale : float
        A segment with a larger share of deleted rows is not extended: they would stay.

    Raises
    ------
    ConfigError
        A value with which merging would never end.
    """

    fan_in: int = 4
    tier: float = 3.0
    floor_rows: int = 4096
    dead_share: float = 0.3
    max_rows: int = 2_000_000
    absorb: float = 16.0
    stale: float = 0.2

    def __post_init__(self) -> None:
        if self.fan_in < 2:
            raise ConfigError(f"fan_in is {self.fan_in}: at least 2 segments can become one")
        if not 0 < self.dead_share <= 1:
            raise ConfigError(f"dead_share is {self.dead_share}: give a number above 0 and at most 1")


def plan(
    sizes: Sequence[SegmentSize], policy: MergePolicy, room: int | None = None, largest: int | None = None
) -> list[int]:
    """Positions in `sizes` of the segments to rewrite into one; empty when nothing is worth doing.

    In this order: what waits for its index (added to a segment that can be extended, or with the rest of its tier where
    that is complete), what is largely dead, a complete tier, the smallest first.

    Parameters
    ----------
    sizes : sequence of SegmentSize
    policy : MergePolicy
    room : int, optional
        Bytes that a job may take; None is any number.
    largest : int, optional
        Bytes that a job will be able to take when room is short: by adding to a segment none is made that could not be
        rewritten then, for the sake of its deleted rows.
    """
    fits = _Fits(sizes, policy.max_rows, room)
    tiers = _tiers(sizes, policy, fits)
    waiting = [position for position, size in enumerate(sizes) if size.frozen]
    if waiting:
        limits = [limit for limit in (room, largest) if limit is not None]
        if absorbed := _absorbed(sizes, waiting, policy, _Fits(sizes, policy.max_rows, min(limits, default=None))):
            return absorbed
        for tier in tiers:
            if any(sizes[position].frozen for position in tier):
                return tier
        together = fits.longest(waiting, at_most=policy.fan_in)
        if together:
            return together
    for position, size in enumerate(sizes):
        if size.dead_share > policy.dead_share and fits.one(position):
            return [position]
    return tiers[0] if tiers else []


def base(sizes: Sequence[SegmentSize], policy: MergePolicy) -> int | None:
    """Of segments that are to be one, the position of the one that the others are added to; None: all are written anew.

    It keeps its deleted rows.
    """
    if len(sizes) < 2:  # then it is rewritten for the sake of its deleted rows
        return None
    able = [at for at, size in enumerate(sizes) if size.extends and size.dead_share <= policy.stale]
    return max(able, key=lambda at: sizes[at].live, default=None)


def written(sizes: Sequence[SegmentSize], policy: MergePolicy) -> int:
    """Rows that making one segment of these takes, less those that are only copied."""
    at = base(sizes, policy)
    return sum(size.live for size in sizes) - (0 if at is None else sizes[at].live)


def _absorbed(sizes: Sequence[SegmentSize], waiting: Sequence[int], policy: MergePolicy, fits: _Fits) -> list[int]:
    """The smallest segment that can take in what waits, and as much of that as fits; empty if there is none."""
    rows = sum(sizes[position].live for position in waiting)
    for _, position in sorted((size.live, position) for position, size in enumerate(sizes) if size.extends):
        size = sizes[position]
        if size.dead_share <= policy.stale and size.live <= policy.absorb * rows:
            taken = fits.longest([position, *waiting])
            if taken[:1] == [position] and len(taken) > 1:
                return sorted(taken)
    return []


def make_room(sizes: Sequence[SegmentSize], dead_share: float, room: int | None = None) -> list[int]:
    """The position of the segment to rewrite where rows are refused for lack of room; empty if none gives back enough.

    Of those with at least `dead_share` of deleted rows and work that fits, the one that gives back most per byte of it.
    """
    worth = [
        position
        for position, size in enumerate(sizes)
        if size.rows > size.live and size.dead_share >= dead_share and (room is None or size.job_bytes <= room)
    ]
    return [max(worth, key=lambda position: sizes[position].gain)] if worth else []


def settle(sizes: Sequence[SegmentSize], policy: MergePolicy, room: int | None = None) -> list[int]:
    """Positions of all segments, where a store that rests is worth making one: each segment is a search by itself.

    Empty where there is one index already, or where all together are too many rows, or too large a job. Few rows are
    not worth an index (`MergePolicy.floor_rows`). The growing segment counts as `frozen` here.
    """
    rows = sum(size.live for size in sizes)
    if (len(sizes) < 2 and not any(size.frozen for size in sizes)) or not policy.floor_rows <= rows <= policy.max_rows:
        return []
    everything = list(range(len(sizes)))
    fits = _Fits(sizes, policy.max_rows, room)
    return everything if fits.longest(everything, at_most=len(sizes)) == everything else []


class _Fits:
    """What can be one segment, and is no larger a job than there is room for."""

    def __init__(self, sizes: Sequence[SegmentSize], max_rows: int, room: int | None) -> None:
        self._sizes, self._max_rows, self._room = sizes, max_rows, room

    def one(self, position: int) -> bool:
        return self._room is None or self._sizes[position].job_bytes <= self._room

    def longest(self, positions: Sequence[int], *, at_most: int | None = None) -> list[int]:
        """The first of `positions` that fit, and as many after it as fit with it."""
        taken: list[int] = []
        rows = job = 0
        for position in positions:
            if not self.one(position):
                continue
            size = self._sizes[position]
            rows, job = rows + size.live, job + max(size.job_bytes, size.copy_bytes if size.extends else 0)
            if taken and (rows > self._max_rows or (self._room is not None and job > self._room)):
                break
            taken.append(position)
            if len(taken) == at_most:
                break
        return taken


def _tiers(sizes: Sequence[SegmentSize], policy: MergePolicy, fits: _Fits) -> list[list[int]]:
    """Complete tiers that fit, each as long as it can be, the smallest first."""
    by_size = sorted(
        (max(size.live, policy.floor_rows), position)
        for position, size in enumerate(sizes)
        if size.live <= policy.max_rows and fits.one(position)
    )
    found = []
    for start, (smallest, _) in enumerate(by_size):
        near = [position for size, position in by_size[start:] if size <= policy.tier * max(smallest, 1)]
        tier = fits.longest(near)
        if len(tier) >= policy.fan_in:
            found.append(sorted(tier))
    return found
