"""Rows that went from here to other workers a moment ago: could one of them belong into an answer?

Who is asked together with this worker may not have taken such a row in yet (`headrace.pipeline.cuts`). Then the answers
fit together only where the row, as it was here, is no better than what was found: it would be in none of them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.reading import to_host
from headrace.gpu.rows import Batch, Left, StoredRow

__all__ = ["Departed", "highest"]

_MOST = 64
_SECONDS = 0.1
"""Who is further behind is waited for: the more rows are looked at, the longer each search takes."""
_MARGIN = 1e-3
"""Scores of an index may differ from ours by rounding."""

Offsets = Mapping[int, int]
_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Some:
    """Rows that went with one batch, their vectors by segment; and `View.moved` and `View.stamp` before it."""

    at: float
    before: Offsets
    applied: Offsets
    topic_partitions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    vectors: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """All that went since `View.moved` was the first one's `before`, and that mapping after the last."""

    some: tuple[_Some, ...]
    until: Offsets


class Departed:
    """The rows that other workers took over lately. Written on one event loop, read by any thread.

    Parameters
    ----------
    metric : {"cosine", "ip", "l2"}
    clock : callable
        Seconds, rising.
    """

    def __init__(self, metric: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._metric, self._clock = metric, clock
        self._some: deque[_Some] = deque(maxlen=_MOST)
        self._known = _Known((), {})

    def note(
        self,
        batch: Batch,
        left: Sequence[Left] | None,
        before: Offsets,
        after: Offsets,
        applied: Offsets = MappingProxyType({}),
    ) -> None:
        """A batch has been applied.

        Parameters
        ----------
        batch : Batch
        left : sequence of Left, or None
            Its rows that went (`Applied.left`); None where it is not known which.
        before, after : mapping of int to int
            `View.moved`.
        applied : mapping of int to int
            `View.stamp` before it.
        """
        if left is None or before is not self._known.until:
            self._some.clear()
        if left:
            rows, vectors = np.concatenate([one.rows for one in left]), tuple(one.vectors for one in left)
            self._some.append(
                _Some(self._clock(), before, applied, batch.topic_partitions[rows], batch.offsets[rows], vectors)
            )
        self._known = _Known(tuple(self._some), after)
        self.tidy()

    def tidy(self) -> None:
        """Let go of those that are too old to be looked at: their vectors take memory of the device."""
        oldest = self._clock() - _SECONDS
        while self._some and self._some[0].at < oldest:
            self._some.popleft()
        if len(self._some) < len(self._known.some):
            self._known = _Known(tuple(self._some), self._known.until)

    def near(
        self,
        moved: Offsets,
        queries: _Floats,
        scores: Sequence[Sequence[float]],
        limit: int,
        rows: Sequence[Sequence[StoredRow]],
    ) -> list[Offsets]:
        """For each query, topic partition to the offset behind the last record that took a row away from here which may
        belong into the answer, or of which that is not known.

        Parameters
        ----------
        moved : mapping of int to int
            `View.moved` of the answer: nothing behind these is of interest, all below them counts.
        queries : float32 (q, dim)
        scores : sequence of (sequence of float), (q,)
            Of what was found, best first.
        limit : int
            Rows that were asked for: whoever found fewer would have taken any row.
        rows : sequence of (sequence of StoredRow), (q,)
            What was found. What has come since a row went is no reason to leave that one out: it may be better now than
            it was here, and was among the best until then.
        """
        if not moved:
            return [moved] * len(queries)
        known = self._known
        oldest = self._clock() - _SECONDS
        some = [one for one in known.some if one.at >= oldest]
        partitions, offsets, vectors = _columns(some)
        starts = np.cumsum([0, *(len(one.offsets) for one in some)])
        answers: list[Offsets] = []
        for query, found, hits in zip(queries, scores, rows, strict=True):
            if len(found) < limit:
                answers.append(moved)
                continue
            newest: dict[int, int] = {}
            for hit in hits:
                newest[hit.topic_partition] = max(hit.offset, newest.get(hit.topic_partition, 0))
            # Later ones have had more applied before them.
            since = next((at for at, one in enumerate(some) if not ahead_of(newest, one.applied)), len(some))
            unknown = some[since].before if since < len(some) else known.until
            near = {tp: end if end > known.until.get(tp, 0) else unknown.get(tp, 0) for tp, end in moved.items()}
            first = int(starts[since])
            for row in (first + np.flatnonzero(self._as_good(vectors[first:], query, found[-1]))).tolist():
                tp = int(partitions[row])
                near[tp] = max(near.get(tp, 0), int(offsets[row]) + 1)
            answers.append(near)
        return answers

    def _as_good(self, vectors: _Floats, query: _Floats, worst: float) -> npt.NDArray[np.bool_]:
        if not len(vectors):
            return np.zeros(0, np.bool_)
        margin = _MARGIN * (1 + abs(worst))
        if self._metric == "l2":
            apart = vectors - query
            return np.asarray(np.einsum("ij,ij->i", apart, apart) <= worst + margin)
        return np.asarray(vectors @ query >= worst - margin)


def ahead_of(newest: Offsets, applied: Offsets) -> bool:
    """Is a record among these offsets that had not been applied?"""
    return any(offset >= applied.get(tp, 0) for tp, offset in newest.items())


def _columns(some: Sequence[_Some]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], _Floats]:
    if not some:
        return np.empty(0, np.int32), np.empty(0, np.int64), np.empty((0, 0), np.float32)
    return (
        np.concatenate([one.topic_partitions for one in some]),
        np.concatenate([one.offsets for one in some]),
        np.concatenate([to_host(vectors) for one in some for vectors in one.vectors]),
    )


def highest(*some: Offsets) -> dict[int, int]:
    """The highest offset of each topic partition."""
    return {tp: max(offsets.get(tp, 0) for offsets in some) for tp in set().union(*some)}
