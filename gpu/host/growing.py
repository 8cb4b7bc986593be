"""Vectors of a growing segment: kept twice, the second time in a byte a number, so that a search reads a quarter.

An exact search of one query reads every vector, and takes as long as memory does to bring them. So the bytes are read
first; the rows that look best by them are scored by the vectors themselves. A byte is off by little, by how much at
most is known for each row: where the worst of the best is better than the bytes of any other row allow, none of these
can be among the best, and the answer is exact. Where that cannot be said (rows that are all alike), all vectors are
read as before. The idea is that of the VA-file (Weber, Schek, Blott: A Quantitative Analysis and Performance Study for
Similarity-Search Methods in High-Dimensional Spaces, VLDB 1998).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.gpu import ranking
from headrace.gpu.buffers import Buffer
from headrace.gpu.growing_vectors import GrowingVectors
from headrace.gpu.host import exact, storage
from headrace.gpu.host.refined import Refined

__all__ = ["CodedVectors", "Codes", "vectors"]

_Floats = npt.NDArray[np.float32]
_Bools = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]

_FEW = 1 << 19
"""So few numbers are read at once as fast as their bytes are."""
_STEPS = 127
_PIECE = 1 << 10
_TINY = 1e-17
"""Lengths are no more exact than this: squares of smaller numbers are lost in float32."""
_LARGE = 1e15
"""Of larger ones the squares may be infinite in float32."""
_UNIT = 2.0**-23
_SEVERAL = 4
"""For each row that is asked for, and eight more, so many are scored. Of 16 K rows, the best ten of 64 are certain for
every query over sentences of 384 numbers, and for 98 to 100 in a hundred over GloVe words of 100 numbers."""
_MORE = 6
"""The same for lone queries, which `headrace.gpu.host.refined` answers: then the first look is enough for 99 in 100
over sentences."""
_LONGEST_REST = 64


def vectors(dim: int, dtype: str, metric: str, expected: int) -> GrowingVectors:
    """An empty buffer; see `headrace.gpu.backend.GrowingKind`."""
    if dtype == "float16":  # half as long to read, and bytes save little more
        return GrowingVectors(np, exact, dim, dtype, metric, expected)
    return CodedVectors(dim, metric, expected)


class Codes:
    """Vectors in a byte a number, and how far off these are.

    Number j of row r is about ``centre[j] + scale * (byte - 128)``. The centre and the scale are learnt from the first
    rows; a number that lies beyond is clipped, which is like any other error.

    Attributes
    ----------
    gap : float
        No vector is farther from what its bytes say.
    reach : float
        What bytes say is never farther from the centre.
    learnt : int
        Rows that the scale fits.
    fits : float
        The gap of these.
    """

    def __init__(self, vectors: _Floats, metric: str, expected: int) -> None:
        self._metric = metric
        self.centre = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        with np.errstate(over="ignore"):
            farthest = max(float((vectors - self.centre).max()), float((self.centre - vectors).max()))
        self.scale = farthest / _STEPS if _TINY < farthest < math.inf else 1.0
        self.gap = self.reach = 0.0
        self._off_origin = _length(self.centre)
        self._view: tuple[int, Any] = 0, None
        self._bytes = _buffer(vectors.shape[1], expected)
        self.append(vectors)
        self.learnt, self.fits = len(vectors), self.gap

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._bytes.nbytes

    def growth(self, more: int) -> int:
        """Bytes that appending `more` rows would add to `nbytes`."""
        return self._bytes.growth(more)

    def append(self, vectors: _Floats) -> None:
        """Write rows behind the last one. Readers of rows that are there already are not disturbed."""
        coded = np.empty(vectors.shape, np.uint8)
        for start in range(0, len(vectors), _PIECE):
            piece = slice(start, start + _PIECE)
            coded[piece] = self._coded(vectors[piece])
        self._bytes.append(coded)

    def _coded(self, rows: _Floats) -> npt.NDArray[np.uint8]:
        """The bytes of some rows; what they lack is noted."""
        with np.errstate(over="ignore"):  # infinitely far off: then nothing is certain
            gaps = rows - self.centre
            steps = np.rint(gaps * np.float32(1 / self.scale)).clip(-_STEPS, _STEPS)
            gaps -= steps * np.float32(self.scale)
            self.reach = max(self.reach, self.scale * _longest(steps))
            self.gap = max(self.gap, _longest(gaps) + 4 * _UNIT * self._size())
        coded: npt.NDArray[np.uint8] = (steps + 128).astype(np.uint8)
        return coded

    @property
    def size(self) -> float:
        """No vector is longer."""
        return self.reach + self._off_origin + self.gap

    def _size(self) -> float:
        """What bytes say is never longer."""
        return self.reach + self._off_origin

    def nearest(
        self, allowed: _Bools | None, queries: _Floats, k: int, rows: int
    ) -> tuple[npt.NDArray[np.float64], _Ints]:
        """The `k` allowed ones of the first `rows` rows that look best, and how good any other row can be at most.

        Returns
        -------
        bound : float64 (q,)
            Any row that is not among these has a lower inner product, or is farther away than this (not squared);
            NaN where that cannot be said.
        rows : int64 (q, k)
            -1 where there are fewer.
        """
        asked = [self._asked(query) for query in queries]
        steps = np.stack([one.steps for one in asked]) if len(asked) > 1 else asked[0].steps[None]
        params = storage.parameters(storage.faiss.SearchParameters, allowed)
        scores, found = storage.search(self.view(rows), steps, k, params)
        size, off = self._size() + self.gap, 4 * ranking.rounding(queries.shape[1])
        bound = np.full(len(queries), np.nan)
        for at, one in enumerate(asked):
            last = float(scores[at, -1])
            if found[at, -1] < 0:
                continue
            if self._metric == "l2":
                less = self.gap + one.lacks + off * (one.length + size)
                bound[at] = self.scale * math.sqrt(last) * (1 - off) - less
            else:
                product = float(np.dot(queries[at], self.centre)) + self.scale * one.scale * last
                bound[at] = product + one.length * (self.gap + off * size) + one.lacks * self.reach
        return bound, found

    def _asked(self, query: _Floats) -> _Asked:
        """FAISS makes bytes of the query too: the error of that has to be known.

        In few steps: what others have put in the processor's caches since the last search makes each of them ten times
        as long as it is when it is timed by itself.
        """
        length = _length(query)
        if not (length < _LARGE and self._size() < _LARGE):
            return _Asked(np.zeros_like(query), 1.0, length, math.nan)
        if self._metric == "l2":
            query = query - self.centre
        largest = max(float(query.max()), -float(query.min()))
        scale = self.scale if self._metric == "l2" else max(largest / _STEPS, _TINY)
        steps = np.rint(query * np.float32(1 / scale))
        if largest > scale * _STEPS:
            steps = steps.clip(-_STEPS, _STEPS)
        return _Asked(steps, scale, length, _length(query - steps * np.float32(scale)))

    def take(self, rows: _Ints) -> npt.NDArray[np.uint8]:
        """The bytes of some rows."""
        taken: npt.NDArray[np.uint8] = self._bytes.take(rows)
        return taken

    def view(self, rows: int) -> Any:
        """FAISS's index over the bytes of the first `rows` rows, kept for the next search of as many."""
        known, view = self._view
        if known != rows:
            view = storage.over(self._bytes.first(rows), self._metric)
            self._view = rows, view
        return view


class _Asked(NamedTuple):
    """A query in bytes, and by how much these are off: NaN where nothing can be said."""

    steps: _Floats
    scale: float
    length: float
    lacks: float


def _length(vector: _Floats) -> float:
    """Rounded up."""
    return math.sqrt(float(np.dot(vector, vector))) * (1 + 2 * ranking.rounding(len(vector))) + _TINY


def _longest(rows: _Floats) -> float:
    """The length of the longest row, rounded up."""
    return math.sqrt(float(np.einsum("ij,ij->i", rows, rows).max())) * (1 + 2 * ranking.rounding(rows.shape[1])) + _TINY


def _buffer(dim: int, expected: int) -> Buffer:
    return Buffer(np, np.uint8, (dim,), expected=expected)


class CodedVectors(GrowingVectors):
    """Rows that are kept as they are and, once there are many, in bytes too."""

    def __init__(self, dim: int, metric: str, expected: int) -> None:
        super().__init__(np, exact, dim, "float32", metric, expected)
        self._dim, self._expected = dim, expected
        self._codes: Codes | None = None
        self._refined: tuple[int, Refined | None] = 0, None
        self._trust = _Trust()
        self._read = False

    @property
    def nbytes(self) -> int:
        return super().nbytes + (self._codes.nbytes if self._codes else 0)

    def growth(self, more: int) -> int:
        codes = self._codes
        if codes is not None:
            return super().growth(more) + codes.growth(more)
        rows, empty = len(self) + more, _buffer(self._dim, self._expected)
        return super().growth(more) + (empty.nbytes + empty.growth(rows) if rows * self._dim >= _FEW else 0)

    def append(self, vectors: _Floats) -> None:
        super().append(vectors)
        kept, codes = self._kept.first(), self._codes
        if codes is None:
            if kept.size >= _FEW:
                self._codes = Codes(kept, self._metric, self._expected)
            return
        codes.append(vectors)
        if codes.gap > 2 * codes.fits and len(kept) >= 2 * codes.learnt:
            self._codes = codes = Codes(kept, self._metric, self._expected)  # what has come is unlike what was first
            self._refined = 0, None
        if self._read:  # better made by the writer than by the next search, which somebody waits for
            self._read = False
            self._view_of(codes, len(kept))

    def search(self, allowed: _Bools | None, queries: _Floats, k: int, rows: int) -> tuple[_Floats, _Ints]:
        codes = self._codes
        several = _SEVERAL * (k + 8)
        if codes is None or rows * self._dim < _FEW or len(queries) > exact.FEW_QUERIES or several * 16 > rows:
            return super().search(allowed, queries, k, rows)
        if allowed is not None:
            count = int(np.count_nonzero(allowed))
            if count * 8 < rows:
                return super().search(allowed, queries, k, rows)
            if count == rows:
                allowed = None
        if not self._trust.worth_a_try():
            return super().search(allowed, queries, k, rows)
        if allowed is None and len(queries) == 1 and self._metric != "l2":
            self._read = True
            answer = self._view_of(codes, rows).search(queries, k, _MORE * (k + 8))
            self._trust.tried(answer is not None)
            return answer or super().search(allowed, queries, k, rows)
        bound, found = codes.nearest(allowed, queries, several, rows)
        scores, best = ranking.nothing_found(np, len(queries), k, self._metric)
        certain = [
            self._scored(query, candidates, least, score, row)
            for query, candidates, least, score, row in zip(queries, found, bound.tolist(), scores, best, strict=True)
        ]
        unsure = [at for at, sure in enumerate(certain) if not sure]
        self._trust.tried(not unsure)
        if unsure:
            scores[unsure], best[unsure] = super().search(allowed, queries[unsure], k, rows)
        return scores, best

    def _view_of(self, codes: Codes, rows: int) -> Refined:
        """The first `rows` rows for lone queries, kept for the next one."""
        known, view = self._refined
        if known != rows or view is None:
            view = Refined(codes, self._kept.first(rows))
            self._refined = rows, view
        return view

    def _scored(self, query: _Floats, candidates: _Ints, bound: float, scores: _Floats, rows: _Ints) -> bool:
        """Write the best of the candidates into `scores` and `rows`, (k,); False if another row may be as good."""
        if math.isnan(bound):
            return False
        candidates.sort()  # of equal rows the first is taken, as where all are read
        vectors = self._kept.take(candidates)
        if self._metric == "l2":
            vectors -= query
            values = np.einsum("ij,ij->i", vectors, vectors)
            order = values.argsort(kind="stable")[: len(rows)]
        else:
            values = np.einsum("ij,j->i", vectors, query)
            order = (-values).argsort(kind="stable")[: len(rows)]
        scores[:], rows[:] = values[order], candidates[order]
        worst = float(scores[-1])
        if self._metric == "l2":
            return math.sqrt(worst) * (1 + ranking.rounding(self._dim)) < bound
        return worst > bound


class _Trust:
    """Whether something that may fail is worth a try: after failures seldom, until it has worked again.

    Readers write this at the same time: a count that is lost costs a search that takes longer.
    """

    __slots__ = ("_failed", "_rest")

    def __init__(self) -> None:
        self._failed = self._rest = 0

    def worth_a_try(self) -> bool:
        if self._rest > 0:
            self._rest -= 1
            return False
        return True

    def tried(self, worked: bool) -> None:
        self._failed = 0 if worked else self._failed + 1
        self._rest = 0 if worked else min(1 << self._failed, _LONGEST_REST)
