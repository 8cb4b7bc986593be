"""The queries that an index is calibrated with: what is asked, and why it is like what will be asked.

**Between**: points a third of the way from a row to an unrelated one are as hard to find the neighbours of as texts and
words that are not in the index. Recall@10 of HNSW over 30 K rows at efSearch 16, 32 and 64:

| queries | docstrings' sentences, 384-d | GloVe words, 100-d |
|---|---|---|
| not in the index | 0.933, 0.977, 0.993 | 0.790, 0.885, 0.942 |
| rows of the index | 0.989, 0.996, 0.998 | 0.880, 0.930, 0.963 |
| rows moved in a random direction, by the distance to the nearest | 0.975, 0.990, 0.997 | 0.722, 0.809, 0.888 |
| 0.3 of the way to a random row | 0.962, 0.983, 0.992 | 0.822, 0.901, 0.945 |
| 0.4 of the way | 0.871, 0.924, 0.961 | 0.733, 0.837, 0.911 |

**Spread**, for graphs: where rows have no structure no new row is near another, so points that are near one promise too
much. Over Gaussian rows (16 K x 128, cosine) they promise 0.80, 0.87 and 0.94, and new rows get 0.39, 0.58 and 0.77;
points that are normally distributed, with the rows' mean and spread in each dimension, get 0.40, 0.59 and 0.78. They
count only where they are about as far from their nearest rows as rows are from theirs. Distance to the tenth nearest,
in that of rows: Gaussian 1.00, binary 1.00 to 1.02; GloVe 1.10, sentences 1.22, clusters 1.6 to 2, where no query that
makes sense is like them, and asking for their recall would cost three times the effort. Of two kinds of rows
(`calibrate_parts.py`) either may be what they resemble, and a kind that all rows' mean and spread do not describe is
described by its own. Over 16 K rows x 32, half noise, half near-copies of 50 vectors, cosine, the first group promises
0.94 at efSearch 32, new noise gets 0.86, and the spread one 0.82.

**Rows** themselves, each without itself, for lists of codes: to these a row of the index is as new as any, whatever the
rows are like. At 48, 64 and 96 lists of 252 new sentences get 0.950, 0.966, 0.984, rows 0.949, 0.967, 0.984; new words
0.965, 0.974, 0.982 and 0.966, 0.975, 0.983; drifting rows with inner products 0.714, 0.867, 0.958 and 0.730, 0.874,
0.964. If they are of two kinds, each is a group; in each group the worst of four places counts. Graphs link a row to
its neighbours, so there rows promise too much, except for inner products, where links lead to long rows instead, and a
part of the rows may never be found: over rows whose mean drifts, the first group finds 0.998 and new rows of the
earliest quarter 0.86, whatever the effort.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array, Backend, IndexKind
from headrace.gpu.calibrate_parts import places, two_kinds, worst

__all__ = ["FEWEST", "Group", "between", "rows", "spreads"]

FEWEST = 64
"""Queries whose true neighbours are looked for at once."""

_MOVED = 1 / 3
_LOOKED_AT = 2048
_JUDGED = 96
_COMPARED = 64
_NEAREST = 10
_ALIKE = 1.06
_ALIKE_PART = 1.1
# For large batches an index may score every row, at an effort for which single queries still get an approximate answer.
_AT_ONCE = 8
_ROUNDING = 8 * float(np.finfo(np.float32).eps)


class Group:
    """Queries, whose true neighbours are looked for when they are first asked: the last ones may never be.

    Parameters
    ----------
    backend : Backend
    vectors : float32 or float16, (n, dim)
    metric : one of `headrace.gpu.backend.METRICS`
    k : int
    queries : float32 (q, dim)
    own : int64 (q,), optional
        The rows that the queries are: these are not counted, recall is that among the `k` - 1 best of the others.
    bounds : float32 (known, 1), optional
        From `_truth`, of the first queries.
    """

    def __init__(
        self,
        backend: Backend,
        vectors: Array,
        metric: str,
        k: int,
        queries: Array,
        *,
        own: Array | None = None,
        bounds: Array | None = None,
    ) -> None:
        self._backend, self._vectors, self._metric, self._k = backend, vectors, metric, k
        self._queries, self._own = queries, own
        self._bounds = queries[:0, :1] if bounds is None else bounds
        self._done = math.inf, 1.0
        self._labels = None if own is None else places(backend, queries)

    def found(self, kind: IndexKind, index: object, asking: int, effort: int, enough: float = 1.0) -> float:
        """Recall of the first `asking` queries; of rows, all are asked if `FEWEST` are, and the worst part counts.

        Where so many found `enough` with less effort, they are not asked again: that recall is told.
        """
        if asking >= FEWEST and effort >= self._done[0]:
            return self._done[1]
        if self._own is not None and asking >= FEWEST:
            asking = len(self._queries)
        known, asking = len(self._bounds), min(asking, len(self._queries))
        if asking > known:
            new = self._queries[known : max(asking, FEWEST)]
            answer = self._backend.exact.search(self._vectors, None, new, self._k, self._metric)
            bounds = _bounds(self._backend, self._vectors, new, *answer, self._metric)
            self._bounds = self._backend.xp.concatenate([self._bounds, bounds])
        hits = self._hits(kind, index, asking, effort)
        of = self._k - (self._own is not None)
        recall = worst(hits, of, None if self._labels is None else self._labels[:asking])
        if recall >= enough and asking >= min(FEWEST, len(self._queries)):
            self._done = effort, recall
        return recall

    def _hits(self, kind: IndexKind, index: object, asking: int, effort: int) -> npt.NDArray[np.int64]:
        sign = -1 if self._metric == "l2" else 1
        hits = []
        for start in range(0, asking, _AT_ONCE):
            some = slice(start, min(start + _AT_ONCE, asking))
            scores, found = kind.search(index, None, self._queries[some], self._k, effort=effort)
            good = sign * scores >= self._bounds[some]
            if self._own is not None:
                good &= found != self._own[some, None]
            hits.append(good.sum(axis=1))
        counts: npt.NDArray[np.int64] = _host(self._backend.xp.concatenate(hits))
        # Where a row is not found itself, one more of the others is: not more count than there are.
        return counts if self._own is None else np.minimum(counts, self._k - 1)


def _bounds(
    backend: Backend,
    vectors: Array,
    asked: Array,
    scores: Array,
    found: Array,
    metric: str,
    own: Array | None = None,
) -> Array:
    """Scores, higher being better, (q, 1), from which on a row is among the best that an exact search found.

    Equal rows have equal scores: which of them are found does not matter, so what rounding may tell apart is let pass.
    Distances are measured from differences, so their rounding is a share of their own; that of an inner product is one
    of both lengths.
    """
    xp = backend.xp
    last, place = scores[:, -1], found[:, -1]
    if own is not None:  # where it is not among them itself, the last is one too many
        among = (found == own[:, None]).any(axis=1)
        last, place = xp.where(among, last, scores[:, -2]), xp.where(among, place, found[:, -2])
    if metric == "l2":
        return (-last - _ROUNDING * abs(last))[:, None]
    norm = xp.linalg.norm
    reached = norm(vectors[place].astype(np.float32), axis=1) * norm(asked, axis=1)
    return (last - _ROUNDING * reached)[:, None]


def between(backend: Backend, vectors: Array, metric: str, count: int, random: np.random.Generator) -> Array:
    """Float32 (count, dim): points between a row and another one, which has nothing to do with it."""
    n = len(vectors)
    chosen = random.choice(n, count, replace=False)
    other = (chosen + random.integers(1, max(2, n), size=count)) % n  # never the row itself
    rows, others = (vectors[backend.xp.asarray(numbers)].astype(np.float32) for numbers in (chosen, other))
    return _asked(backend, rows + _MOVED * (others - rows), metric)


def rows(backend: Backend, vectors: Array, metric: str, k: int, count: int, random: np.random.Generator) -> list[Group]:
    """Rows, one group for each kind of them; none where `k` is 1 or all rows are found."""
    if k < 2 or len(vectors) <= k:
        return []
    xp = backend.xp
    own = xp.asarray(random.choice(len(vectors), count, replace=False))
    points = vectors[own].astype(np.float32)
    answer = scores, found = backend.exact.search(vectors, None, points, k + 1, metric)
    bounds = _bounds(backend, vectors, points, scores[:, :k], found[:, :k], metric, own)
    if metric == "ip":
        answer = backend.exact.search(vectors, None, points, k + 1, "l2")
    far = two_kinds(_host(_distances(backend, answer[0], metric)[:, k]))
    kinds = [np.arange(count)] if far is None else [np.flatnonzero(~far), np.flatnonzero(far)]
    return [
        Group(backend, vectors, metric, k, points[some], own=own[some], bounds=bounds[some])
        for some in map(xp.asarray, kinds)
    ]


def spreads(backend: Backend, vectors: Array, metric: str, count: int, random: np.random.Generator) -> list[Array]:
    """Float32 (count, dim) each: normally distributed, with the mean and spread of the rows, or of one kind of them.

    Only those that are about as far from their nearest rows as rows are from theirs.
    """
    n, k = len(vectors), min(_NEAREST, len(vectors) - 1)
    if k < 1:
        return []
    judged = random.choice(n, min(_JUDGED, n), replace=False)
    some = vectors[backend.xp.asarray(judged)].astype(np.float32)
    looked_at = np.sort(random.choice(n, min(_LOOKED_AT, n), replace=False))
    apart = _apart(backend, vectors, metric, some, k + 1)  # a row is its own nearest
    far = two_kinds(apart)
    whole = _spread(backend, vectors[backend.xp.asarray(looked_at)], metric, count, random)
    away = float(np.median(_apart(backend, vectors, metric, whole[:_COMPARED], k)))
    if far is None:
        return [whole] if away <= _ALIKE * float(np.median(apart)) else []
    alike = []
    for kind in (far, ~far):
        points, reached, usual = whole, away, float(np.median(apart[kind]))
        if not usual / _ALIKE_PART <= reached <= _ALIKE_PART * usual:
            points = _spread(backend, some[backend.xp.asarray(np.flatnonzero(kind))], metric, count, random)
            reached = float(np.median(_apart(backend, vectors, metric, points[:_COMPARED], k)))
        if usual / _ALIKE_PART <= reached <= _ALIKE_PART * usual:
            alike.append(points)
    return alike


def _spread(backend: Backend, some: Array, metric: str, count: int, random: np.random.Generator) -> Array:
    some = some.astype(np.float64)
    noise = backend.xp.asarray(random.standard_normal((count, some.shape[1])))
    return _asked(backend, some.mean(axis=0) + some.std(axis=0) * noise, metric)


def _apart(backend: Backend, vectors: Array, metric: str, points: Array, k: int) -> npt.NDArray[np.float64]:
    """Distance of each point to its `k`-th nearest row, (p,); products of rows of length 1 tell it in half the time."""
    scores = backend.exact.search(vectors, None, points, k, metric if metric == "cosine" else "l2")[0]
    return _host(_distances(backend, scores, metric)[:, k - 1])


def _distances(backend: Backend, scores: Array, metric: str) -> Array:
    return backend.xp.sqrt(backend.xp.maximum(2 - 2 * scores if metric == "cosine" else scores, 0))


def _asked(backend: Backend, points: Array, metric: str) -> Array:
    if metric == "cosine":
        lengths = backend.xp.linalg.norm(points, axis=1, keepdims=True)
        points = points / backend.xp.where(lengths > 0, lengths, 1)
    return points.astype(np.float32)


def _host(array: Array) -> npt.NDArray[Any]:
    host: npt.NDArray[Any] = array.get() if hasattr(array, "get") else np.asarray(array)
    return host
