"""Do the copies agree? Pure functions from what copies answer to what differs.

Copies answer at moments of their own, while records go on being applied, in any order within what is under way. So a
sum that differs proves nothing. What proves a difference is `judge`: it looks at one id on all copies, and knows which
of them must have applied what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.state import CollectionState
from headrace.gpu.rows import DELETED

__all__ = ["Heard", "Judgement", "differing_cells", "heard_from_wire", "judge", "newest", "odd_digests"]

_Digests = npt.NDArray[np.uint64]
Sums = Mapping[int, tuple[int, str]]
Offsets = Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Heard:
    """What one copy knows of one id: the newest version, and the cell of its row.

    Attributes
    ----------
    topic_partition, offset, timestamp : int
    cell : int
        `DELETED`: there is no row, the version is only remembered.
    """

    topic_partition: int
    offset: int
    timestamp: int
    cell: int

    @property
    def live(self) -> bool:
        return self.cell != DELETED

    def same_version(self, other: Heard) -> bool:
        return (self.topic_partition, self.offset) == (other.topic_partition, other.offset)

    def newer_than(self, other: Heard) -> bool:
        """As `headrace.gpu.versions.compare`."""
        if self.topic_partition == other.topic_partition:
            return self.offset > other.offset
        return (self.timestamp, self.topic_partition) > (other.timestamp, other.topic_partition)

    def __str__(self) -> str:
        return f"topic partition {self.topic_partition} offset {self.offset}"


def heard_from_wire(wire: Sequence[Any]) -> list[Heard | None]:
    return [None if one is None else Heard(*one) for one in wire]


def newest(all_heard: Sequence[Heard]) -> Heard | None:
    """The highest version; a row before a memory of the same version."""
    best: Heard | None = None
    for heard in all_heard:
        if best is None or heard.newer_than(best) or (heard.same_version(best) and heard.live and not best.live):
            best = heard
    return best


def differing_cells(state: CollectionState, sums: Mapping[str, Sums]) -> list[int]:
    """Cells whose sums are not the same on all who serve them, or that have rows where they should have none.

    Parameters
    ----------
    state : CollectionState
    sums : mapping of worker to (mapping of cell to (rows, digest))
        A cell without rows is left out.
    """
    found = []
    for cell in sorted({*state.cells, *(cell for some in sums.values() for cell in some)}):
        serving = [worker for worker in state.serving.get(cell, ()) if worker in sums]
        strays = any(cell in some and not holds(state, worker, cell) for worker, some in sums.items())
        if strays or len({sums[worker].get(cell) for worker in serving}) > 1:
            found.append(cell)
    return found


def holds(state: CollectionState, worker: str, cell: int) -> bool:
    """Is `worker` to have rows of `cell`?"""
    return worker in state.copies.get(cell, ()) or worker in state.serving.get(cell, ())


def odd_digests(digests: Mapping[str, _Digests], serving: Sequence[str]) -> dict[str, _Digests]:
    """By worker, the digests of its rows of one cell that not all of `serving` have, that it should not have, or that
    it has more than once.

    Parameters
    ----------
    digests : mapping of worker to uint64 (rows,)
    serving : sequence of str
    """
    held = [digests[worker] for worker in serving if worker in digests]
    values, counts = (
        np.unique(np.concatenate([np.unique(some) for some in held]), return_counts=True)
        if held
        else (
            np.empty(0, dtype=np.uint64),
            np.empty(0, dtype=np.int64),
        )
    )
    everywhere = values[counts == len(held)]
    return {
        worker: some[~np.isin(some, everywhere) | np.isin(some, _repeated(some))] if worker in serving else some
        for worker, some in digests.items()
    }


def _repeated(digests: _Digests) -> _Digests:
    values, counts = np.unique(digests, return_counts=True)
    return values[counts > 1]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What is the matter with one id.

    Attributes
    ----------
    wait_for : mapping of int to int
        Not empty: a record may be under way; ask again once every copy has applied these offsets.
    faults : mapping of str to str
        Worker to what is wrong there. Empty, with nothing to wait for: the copies agree.
    cell : int or None
        Of the row, as far as the copies can tell.
    """

    wait_for: Offsets = field(default_factory=dict)
    faults: Mapping[str, str] = field(default_factory=dict)
    cell: int | None = None


def judge(
    heard: Mapping[str, Heard | None], marks: Mapping[str, Offsets], ends: Offsets | None, state: CollectionState
) -> Judgement:
    """Do the copies agree about one id?

    Sound while no copy forgets a deletion: then whoever has a watermark above a version knows that version or a newer
    one, unless it should have nothing. The rule is the highest version that any copy knows; the log may know better.

    Parameters
    ----------
    heard : mapping of worker to Heard or None
        Of all active workers.
    marks : mapping of worker to offsets
        What each had applied when it said so.
    ends : mapping of int to int, or None
        Where the log ended after they had: a version beyond cannot be. None if nobody knows.
    """
    impossible = {
        worker: f"has {one}, where the log has no record"
        for worker, one in heard.items()
        if one is not None and ends is not None and one.offset >= ends.get(one.topic_partition, 0)
    }
    best = newest([one for worker, one in heard.items() if one is not None and worker not in impossible])
    if best is None:
        return Judgement(faults=impossible)
    partition, offset = best.topic_partition, best.offset
    for worker, one in heard.items():
        knows = one is not None and one.same_version(best)
        if not knows and marks[worker].get(partition, 0) <= offset:
            return Judgement(wait_for={partition: offset + 1})
    rows = {worker: one for worker, one in heard.items() if one is not None and one.live}
    faults = dict(impossible)
    if not best.live:
        faults |= {worker: f"still has the row of {one}" for worker, one in rows.items() if worker not in impossible}
        return Judgement(faults=faults)
    cell = best.cell
    for worker, one in heard.items():
        row = rows.get(worker)
        if worker in impossible:
            continue
        if row is not None and row.same_version(best) and row.cell != cell:
            faults[worker] = f"has the row in cell {row.cell}, another copy in {cell}"
        elif worker in state.serving.get(cell, ()):
            if row is None:
                faults[worker] = "lacks it"
            elif not row.same_version(best):
                faults[worker] = f"has {one} instead of offset {offset}"
        elif row is not None and not holds(state, worker, cell):
            faults[worker] = f"has a row too many, of {one}"
    return Judgement(faults=faults, cell=cell)
