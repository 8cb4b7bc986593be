"""Which segments should become one: a pure function of their sizes, as in Tantivy's and Lucene's merge policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["MergePolicy", "SegmentSize", "plan"]


@dataclass(frozen=True, slots=True)
class SegmentSize:
    """What the policy looks at.

    Attributes
    ----------
    rows, live : int
        Rows written, and those of them that are still alive.
    frozen : bool
        A former growing segment that waits for its index; always next in line.
    """

    rows: int
    live: int
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class MergePolicy:
    """Tiered: segments within a factor of `tier` of each other merge once there are `fan_in` of them.

    Attributes
    ----------
    fan_in : int
        Fewer means fewer segments to search and more rewriting: each row is rewritten about log(rows) / log(fan_in)
        times.
    tier : float
    dead_share : float
        A segment with a larger share of deleted rows is rewritten by itself.
    max_rows : int
        No merge of several segments makes a larger one.
    """

    fan_in: int = 4
    tier: float = 4.0
    dead_share: float = 0.3
    max_rows: int = 2_000_000


def plan(sizes: Sequence[SegmentSize], policy: MergePolicy) -> list[int]:
    """Positions in `sizes` of the segments to rewrite into one, best job first; empty when nothing is worth doing."""
    for position, size in enumerate(sizes):
        if size.frozen:
            return [position]
    for position, size in enumerate(sizes):
        if size.rows and (size.rows - size.live) / size.rows > policy.dead_share:
            return [position]
    by_size = sorted((size.live, position) for position, size in enumerate(sizes) if size.live <= policy.max_rows)
    for start in range(len(by_size) - policy.fan_in + 1):
        group = by_size[start : start + policy.fan_in]
        if group[-1][0] <= policy.tier * max(group[0][0], 1) and sum(live for live, _ in group) <= policy.max_rows:
            return sorted(position for _, position in group)
    return []
