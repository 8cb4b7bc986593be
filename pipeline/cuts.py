"""Do the answers of several workers fit together, or did a row slip through between them? Pure.

A record that moves its id to a cell on other workers is applied by each in its own moment. Who asks the old holder
after it has let go of the row, and the new one before it has taken it in, is told by nobody of a row that was there all
the time. Therefore a worker says, with every answer, below which offset lie all records that took a row away from it
(`View.moved`), and an answer counts beside it only where it has applied as much. Rows that were deleted need no such
care: nobody is to show them. A store that was filled from parts of a snapshot, taken at different moments, is ahead of
itself in the same way: its own answer counts when it has caught up.

Where much is written two workers are hardly ever equally far, so waiting for the one that is behind would have no end:
the other goes on meanwhile. Who is `ahead` is asked for its answer of a moment ago, when it had taken nothing away that
not all of them know (`common`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

__all__ = ["ahead", "common", "left_behind"]

Offsets = Mapping[int, int]


def left_behind(answers: Sequence[tuple[Offsets, Offsets]]) -> dict[int, int]:
    """What must have been applied everywhere for the answers to fit together; nothing if they do.

    Parameters
    ----------
    answers : sequence of (applied, moved)
        For each worker that was asked, topic partition to the first offset that it had not applied; and to the offset
        behind the last record that took a row from it to another worker.
    """
    needed: dict[int, int] = {}
    for _, moved in answers:
        for tp, offset in moved.items():
            needed[tp] = max(offset, needed.get(tp, 0))
    return {tp: offset for tp, offset in needed.items() if any(applied.get(tp, 0) < offset for applied, _ in answers)}


def common(answers: Sequence[tuple[Offsets, Offsets]]) -> dict[int, int]:
    """What all have applied, topic partition to offset; `answers` as in `left_behind`."""
    applied = [offsets for offsets, _ in answers]
    return {tp: min(offsets.get(tp, 0) for offsets in applied) for tp in set().union(*applied)}


def ahead(moved: Offsets, cut: Offsets) -> bool:
    """Has a record at or above `cut` taken a row away from this worker?"""
    return any(offset > cut.get(tp, 0) for tp, offset in moved.items())
