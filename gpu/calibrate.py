"""How much effort a recall takes, measured on the index itself when it is built.

What is asked are points a third of the way from a row to another one drawn at random: as hard to find the neighbours of
as texts and words that are not in the index. Recall@10 of HNSW over 30 K rows at efSearch 16, 32 and 64:

| queries | docstrings' sentences, 384-d | GloVe words, 100-d |
|---|---|---|
| not in the index | 0.933, 0.977, 0.993 | 0.790, 0.885, 0.942 |
| rows of the index | 0.989, 0.996, 0.998 | 0.880, 0.930, 0.963 |
| rows moved in a random direction, by the distance to the nearest | 0.975, 0.990, 0.997 | 0.722, 0.809, 0.888 |
| 0.3 of the way to a random row | 0.962, 0.983, 0.992 | 0.822, 0.901, 0.945 |
| 0.4 of the way | 0.871, 0.924, 0.961 | 0.733, 0.837, 0.911 |
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.gpu.backend import Array, Backend, IndexKind
from headrace.gpu.errors import BackendError

__all__ = ["Calibration", "calibrate"]

_MOVED = 1 / 3
_ENOUGH = 0.9995
# For large batches an index may score every row, at an effort for which single queries still get an approximate answer.
_AT_ONCE = 8
_ROUNDING = 1e-5


@dataclass(frozen=True, slots=True)
class Calibration:
    """Recall by effort of one index.

    Attributes
    ----------
    pairs : tuple of (int, float)
        Effort and recall, both rising; never empty.
    """

    pairs: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        efforts, recalls = zip(*self.pairs, strict=True) if self.pairs else ((), ())
        if not efforts or list(efforts) != sorted(set(efforts)) or list(recalls) != sorted(recalls):
            raise BackendError(
                f"calibration {self.pairs!r} is not of rising efforts and recalls: build the index again"
            )

    def effort(self, recall_target: float) -> int:
        """The effort that reaches the target, on a straight line between two that were tried; the highest tried where
        none has.

        Recall rises ever more slowly with effort, so it lies above the line.
        """
        least, below = self.pairs[0]
        for effort, recall in self.pairs:
            if recall >= recall_target:
                share = 1.0 if effort == least else (recall_target - below) / (recall - below)
                return math.ceil(least + share * (effort - least))
            least, below = effort, recall
        return least

    def recall(self, effort: int) -> float:
        """The recall that was measured at an effort, on a straight line between two that were tried."""
        efforts, recalls = zip(*self.pairs, strict=True)
        return float(np.interp(effort, efforts, recalls))

    def to_wire(self) -> list[list[float]]:
        """The pairs as plain types, for msgpack or JSON."""
        return [[effort, recall] for effort, recall in self.pairs]

    @classmethod
    def from_wire(cls, pairs: Sequence[Sequence[float]]) -> Calibration:
        """The reverse of `to_wire`; raises `BackendError` where that cannot have made it."""
        try:
            return cls(tuple((int(effort), float(recall)) for effort, recall in pairs))
        except (TypeError, ValueError) as error:
            raise BackendError(f"calibration {pairs!r} is not of pairs of numbers: build the index again") from error


def calibrate(
    backend: Backend,
    kind: IndexKind,
    index: Any,
    vectors: Array,
    metric: str,
    *,
    k: int = 10,
    queries: int = 128,
    seed: int = 0,
) -> Calibration:
    """Search a new index with rising effort until it finds nearly everything, and note the recall.

    Takes two exact searches and up to a dozen approximate ones, of `queries` queries each: under a fiftieth of the
    time of building a graph. Where every search is exact, nothing is searched.

    Parameters
    ----------
    backend : Backend
    kind : IndexKind
        Of `backend.kinds`.
    index : Any
        From `kind.build`.
    vectors : float32 or float16, (n, dim)
        The indexed vectors, in the dtype that the index keeps.
    metric : one of `headrace.gpu.backend.METRICS`
    k : int
        Recall is measured among so many rows.
    queries : int
        At most; there are no more than rows.
    seed : int
        The same arguments give the same calibration.
    """
    efforts = kind.efforts(index, k)
    if efforts == (0,):
        return Calibration(((0, 1.0),))
    asked = _queries(backend, vectors, metric, queries, seed)
    k = min(k, len(vectors))
    sign = -1 if metric == "l2" else 1
    truth = sign * backend.exact.search(vectors, None, asked, k, metric)[0][:, -1:]
    # Equal rows have equal scores: which of them are found does not matter. Only rounding tells them apart.
    bound = truth - _ROUNDING * (abs(truth) + abs(truth).mean())
    pairs: list[tuple[int, float]] = []
    best = 0.0
    for effort in efforts:
        hits = 0
        for start in range(0, len(asked), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            scores = kind.search(index, None, asked[some], k, effort=effort)[0]
            hits += int((sign * scores >= bound[some]).sum())
        best = max(best, hits / (k * len(asked)))
        pairs.append((effort, best))
        if best >= _ENOUGH:
            break
    return Calibration(tuple(pairs))


def _queries(backend: Backend, vectors: Array, metric: str, queries: int, seed: int) -> Array:
    """Float32 (q, dim): points between rows."""
    random = np.random.default_rng(seed)
    count = min(queries, len(vectors))
    chosen = [np.sort(random.choice(len(vectors), count, replace=False)) for _ in range(2)]
    rows, others = (vectors[backend.xp.asarray(numbers)].astype(np.float32) for numbers in chosen)
    moved = rows + _MOVED * (others - rows)
    if metric == "cosine":
        moved /= backend.xp.linalg.norm(moved, axis=1, keepdims=True)
    return moved.astype(np.float32)
