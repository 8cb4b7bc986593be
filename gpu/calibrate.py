"""How much effort a recall takes, measured on the index itself when it is built.

What is asked are points a third of the way from a row to an unrelated one: as hard to find the neighbours of as texts
and words that are not in the index. Recall@10 of HNSW over 30 K rows at efSearch 16, 32 and 64:

| queries | docstrings' sentences, 384-d | GloVe words, 100-d |
|---|---|---|
| not in the index | 0.933, 0.977, 0.993 | 0.790, 0.885, 0.942 |
| rows of the index | 0.989, 0.996, 0.998 | 0.880, 0.930, 0.963 |
| rows moved in a random direction, by the distance to the nearest | 0.975, 0.990, 0.997 | 0.722, 0.809, 0.888 |
| 0.3 of the way to a random row | 0.962, 0.983, 0.992 | 0.822, 0.901, 0.945 |
| 0.4 of the way | 0.871, 0.924, 0.961 | 0.733, 0.837, 0.911 |

Such points are near a row, and where rows have no structure no new row is near another: over Gaussian rows (16 K x 128,
cosine) they promise 0.80, 0.87 and 0.94, and new rows get 0.39, 0.58 and 0.77. So a second group is asked: normally
distributed, with the rows' mean and spread in each dimension. It gets 0.40, 0.59 and 0.78 there. It counts only where
it resembles the rows, that is, where it is about as far from its nearest rows as these are from theirs; then the worse
of the two groups' recalls counts. Distance to the tenth nearest row, of the group in those of rows: Gaussian 1.00,
binary 1.00 to 1.02; GloVe 1.12, sentences 1.24, clusters 2.6, where no query that makes sense is like the group, and
asking for its recall would cost three times the effort.

A third, smaller group lies among rows that are near each other: compressed codes tell these apart least. Over 50
clusters (16 K x 32) IVF-PQ finds 0.94 of the neighbours of new rows where the first group promises 0.99. Graphs are not
asked about it: of eleven sets of rows there was none where they found over 0.02 less of it than of the others.

High efforts take most of the time, so none is tried beyond what will be asked for, nor far below; each is twice the one
before.

What nobody can know beforehand is the recall of queries that are unlike all rows. Once such have come they are known:
the latest ones that the store was asked are a group too. In the streaming protocol of big-ann-benchmarks, where most
queries' own clusters are not there yet, recall was 0.938 without them and is 0.950 (sliding window: 0.949 and 0.961).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.gpu.backend import Array, Backend, IndexKind
from headrace.gpu.errors import BackendError

__all__ = ["EXACT", "Calibration", "calibrate"]

EXACT = (1 << 31) - 1
"""The effort that means an exact search, whatever the kind: none has as many rows."""

_MOVED = 1 / 3
_ENOUGH = 0.99
_ALL = 0.9995
_STEP = 2
_NEAR = 0.05
_LOOKED_AT = 2048
_COMPARED = 32
_CHEAP = 2
_FEWEST = 64
_SOME = 64
_FEW = 16
_KNOWN = 32
_SAMPLE = 1024
_NEIGHBOURS = 8
_NEAREST = 10
_ALIKE = 1.06
# For large batches an index may score every row, at an effort for which single queries still get an approximate answer.
_AT_ONCE = 8
_ROUNDING = 8 * float(np.finfo(np.float32).eps)


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
        """The effort that reaches the target, on a straight line between two that were tried; `EXACT` where none has.

        Recall rises ever more slowly with effort, so it lies above the line.
        """
        least, below = self.pairs[0]
        for effort, recall in self.pairs:
            if recall >= recall_target:
                share = 1.0 if effort == least else (recall_target - below) / (recall - below)
                return math.ceil(least + share * (effort - least))
            least, below = effort, recall
        return EXACT

    def recall(self, effort: int) -> float:
        """The recall that was measured at an effort, on a straight line between two that were tried; 1 at `EXACT`."""
        if effort >= EXACT:
            return 1.0
        efforts, recalls = zip(*self.pairs, strict=True)
        return float(np.interp(effort, efforts, recalls))

    @property
    def best(self) -> float:
        """The highest recall that any effort reached."""
        return self.pairs[-1][1]

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
    recall_target: float = 0.95,
    k: int = 10,
    queries: int = 192,
    seed: int = 0,
    asked: Array | None = None,
) -> Calibration:
    """Search a new index with rising effort until it finds `recall_target`, and 0.99, and note the recall.

    Takes an exact search of 130 to 450 queries and some approximate ones: 0.15 s of one core for 16 K sentences of 384
    numbers, whose graph takes 3.1 s, and 0.1 s for their lists of codes, which take 0.5 s; hardly more for more rows.
    Where every search is exact, nothing is searched.

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
    recall_target : float
        What searches will mostly ask for. Efforts that find far less, or more than this and 0.99, are not tried: for
        these `Calibration.effort` gives the least that was, and `EXACT`.
    k : int
        Recall is measured among so many rows.
    queries : int
        Of each group, at most; there are no more than rows.
    seed : int
        The same arguments give the same calibration.
    asked : float32 (q, dim), optional
        Queries that searches came with (`headrace.gpu.asked`). From 32 on their recall counts like the groups'.
    """
    efforts = kind.efforts(index, k)
    if efforts == (0,):
        return Calibration(((0, 1.0),))
    random = np.random.default_rng(seed)
    count = min(queries, len(vectors))
    groups = [_between(backend, vectors, metric, count, random)]
    if len(vectors) > _NEIGHBOURS and kind is not backend.kinds["graph"]:
        groups.append(_among(backend, vectors, metric, min(_SOME, count), random))
    spread = _spread(backend, vectors, metric, count, random)
    if _alike(backend, vectors, metric, spread, random):
        groups.append(spread)
    k = min(k, len(vectors))
    if asked is not None and len(asked) >= _KNOWN:
        groups.append(backend.xp.asarray(random.permutation(asked)))
    judges = [_Group(backend, vectors, metric, k, points) for points in groups]

    def found(effort: int, most: int) -> float:
        # Where little effort finds little, many queries are needed to see how much; elsewhere each takes more time.
        asking = min(most, max(_FEWEST, queries * _CHEAP * efforts[0] // effort))
        return min(group.found(kind, index, asking, effort) for group in judges)

    tried = _climb(efforts, recall_target, lambda effort: found(effort, count), lambda effort: found(effort, _FEW))
    rising = np.maximum.accumulate([tried[effort] for effort in sorted(tried)])
    return Calibration(tuple(zip(sorted(tried), rising.tolist(), strict=True)))


def _climb(
    efforts: Sequence[int], recall_target: float, found: Callable[[int], float], roughly: Callable[[int], float]
) -> dict[int, float]:
    """Recall by effort, for efforts from below the target to where it is reached, and 0.99 too; not in order.

    Efforts are doubled. The first is the one that a few queries say is near the target: were it beyond, smaller ones
    are tried too.
    """
    steps = [efforts[0]]
    for effort in efforts:
        if effort >= _STEP * steps[-1]:
            steps.append(effort)
    if steps[-1] != efforts[-1]:
        steps.append(efforts[-1])
    goal = min(max(recall_target, _ENOUGH), _ALL)
    first = 0
    while first < len(steps) - 1 and roughly(steps[first]) < recall_target - _NEAR:
        first += 1
    tried = {steps[first]: found(steps[first])}
    for effort in reversed(steps[:first]):
        if min(tried.values()) < recall_target:
            break
        tried[effort] = found(effort)
    for effort in steps[first + 1 :]:
        if max(tried.values()) >= goal:
            break
        tried[effort] = found(effort)
    return tried


class _Group:
    """Queries, whose true neighbours are looked for when they are first asked: the last ones may never be."""

    def __init__(self, backend: Backend, vectors: Array, metric: str, k: int, queries: Array) -> None:
        self._backend, self._vectors, self._metric, self._k = backend, vectors, metric, k
        self._queries, self._bounds = queries, queries[:0, :1]

    def found(self, kind: IndexKind, index: Any, asking: int, effort: int) -> float:
        """Recall of the first `asking` queries."""
        known, asking = len(self._bounds), min(asking, len(self._queries))
        if asking > known:
            new = self._queries[known : max(asking, _FEWEST)]
            bounds = _bound(self._backend, self._vectors, new, self._k, self._metric)
            self._bounds = self._backend.xp.concatenate([self._bounds, bounds])
        return _found(kind, index, self._queries[:asking], self._bounds[:asking], self._k, self._metric, effort)


def _bound(backend: Backend, vectors: Array, asked: Array, k: int, metric: str) -> Array:
    """Scores, higher being better, (q, 1), from which on a row is among the `k` best.

    Equal rows have equal scores: which of them are found does not matter, so what rounding may tell apart is let pass.
    Distances are measured from differences, so their rounding is a share of their own; that of an inner product is one
    of both lengths.
    """
    scores, rows = backend.exact.search(vectors, None, asked, k, metric)
    last = scores[:, -1:]
    if metric == "l2":
        return -last - _ROUNDING * abs(last)
    norm = backend.xp.linalg.norm
    reached = norm(vectors[rows[:, -1]].astype(np.float32), axis=1) * norm(asked, axis=1)
    return last - _ROUNDING * reached[:, None]


def _found(kind: IndexKind, index: Any, asked: Array, bound: Array, k: int, metric: str, effort: int) -> float:
    """Recall at an effort."""
    sign = -1 if metric == "l2" else 1
    hits = 0
    for start in range(0, len(asked), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        scores = kind.search(index, None, asked[some], k, effort=effort)[0]
        hits += int((sign * scores >= bound[some]).sum())
    return hits / (k * len(asked))


def _between(backend: Backend, vectors: Array, metric: str, count: int, random: np.random.Generator) -> Array:
    """Float32 (count, dim): points between a row and another one, which has nothing to do with it."""
    n = len(vectors)
    chosen = random.choice(n, count, replace=False)
    other = (chosen + random.integers(1, max(2, n), size=count)) % n  # never the row itself
    rows, others = (vectors[backend.xp.asarray(numbers)].astype(np.float32) for numbers in (chosen, other))
    return _asked(backend, rows + _MOVED * (others - rows), metric)


def _among(backend: Backend, vectors: Array, metric: str, count: int, random: np.random.Generator) -> Array:
    """Float32 (count, dim): points among rows that are near each other, with their mean and spread."""
    xp, n = backend.xp, len(vectors)
    sample = vectors[xp.asarray(np.sort(random.choice(n, min(_SAMPLE, n), replace=False)))].astype(np.float32)
    middles = sample[xp.asarray(random.choice(len(sample), min(count, len(sample)), replace=False))]
    near = sample[backend.exact.search(sample, None, middles, _NEIGHBOURS, "l2")[1]].astype(np.float64)
    mean = near.mean(axis=1, keepdims=True)
    weights = xp.asarray(random.standard_normal((len(near), _NEIGHBOURS, 1))) / math.sqrt(_NEIGHBOURS - 1)
    return _asked(backend, mean[:, 0] + (weights * (near - mean)).sum(axis=1), metric)


def _spread(backend: Backend, vectors: Array, metric: str, count: int, random: np.random.Generator) -> Array:
    """Float32 (count, dim): normally distributed, with the rows' mean and spread in each dimension."""
    xp = backend.xp
    looked_at = random.choice(len(vectors), min(_LOOKED_AT, len(vectors)), replace=False)
    some = vectors[xp.asarray(np.sort(looked_at))].astype(np.float64)
    noise = xp.asarray(random.standard_normal((count, vectors.shape[1])))
    return _asked(backend, some.mean(axis=0) + some.std(axis=0) * noise, metric)


def _asked(backend: Backend, points: Array, metric: str) -> Array:
    if metric == "cosine":
        lengths = backend.xp.linalg.norm(points, axis=1, keepdims=True)
        points = points / backend.xp.where(lengths > 0, lengths, 1)
    return points.astype(np.float32)


def _alike(backend: Backend, vectors: Array, metric: str, spread: Array, random: np.random.Generator) -> bool:
    """Are these points about as far from their nearest rows as rows are from theirs?"""
    xp, k = backend.xp, min(_NEAREST, len(vectors) - 1)
    if k < 1:
        return False
    points = spread[:_COMPARED]
    rows = vectors[xp.asarray(random.choice(len(vectors), len(points), replace=False))].astype(np.float32)
    both = xp.concatenate([rows, points])
    if metric == "cosine":  # products of rows of length 1 tell distances, in half the time
        squares = 2 - 2 * backend.exact.search(vectors, None, both, k + 1, metric)[0]
    else:
        squares = backend.exact.search(vectors, None, both, k + 1, "l2")[0]
    distances = xp.sqrt(xp.maximum(squares, 0))
    of_rows, of_points = distances[: len(rows), k], distances[len(rows) :, k - 1]  # a row is its own nearest
    return bool(xp.median(of_points) <= _ALIKE * xp.median(of_rows))
