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

import numpy as np
import numpy.typing as npt

from headrace.gpu import ranking
from headrace.gpu.buffers import Buffer
from headrace.gpu.growing_vectors import GrowingVectors
from headrace.gpu.host import exact, storage

__all__ = ["CodedVectors", "Codes", "vectors"]

_Floats = npt.NDArray[np.float32]
_Bools = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]

_FEW = 1 << 20
"""So few numbers are read at once as fast as their bytes are."""
_STEPS = 127
_PIECE = 1 << 10
_TINY = 1e-17
"""Lengths are no more exact than this: squares of smaller numbers are lost in float32."""
_UNIT = 2.0**-23
_SEVERAL = 4
"""For each row that is asked for, and eight more, so many are scored. Of 16 K rows, the best ten of 64 are certain for
every query over sentences of 384 numbers, and for 98 to 100 in a hundred over GloVe words of 100 numbers."""
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

    def __init__(self, vectors: _Floats, expected: int) -> None:
        self.centre = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        with np.errstate(over="ignore"):
            farthest = max(float((vectors - self.centre).max()), float((self.centre - vectors).max()))
        self.scale = farthest / _STEPS if _TINY < farthest < math.inf else 1.0
        self.gap = self.reach = 0.0
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

    def _size(self) -> float:
        """No vector is longer, but by the gap."""
        return self.reach + _longest(self.centre[None])

    def nearest(
        self, allowed: _Bools | None, queries: _Floats, k: int, metric: str, rows: int
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
        view = storage.over(self._bytes.first(rows), metric)
        params = storage.parameters(storage.faiss.SearchParameters, allowed)
        off = 4 * ranking.rounding(queries.shape[1])
        size = self._size() + self.gap
        with np.errstate(over="ignore", invalid="ignore"):
            middle = self.centre if metric == "l2" else np.float32(0)
            scale = abs(queries).max(axis=1, keepdims=True) / np.float32(_STEPS)
            if metric == "l2":
                scale = np.full_like(scale, self.scale)
            # FAISS makes bytes of the query too: the error of that has to be known.
            asked = np.rint((queries - middle) / scale).clip(-_STEPS, _STEPS)
            lacks = np.array([_longest(gap[None]) for gap in queries - middle - asked * scale])
            scores, found = storage.search(view, asked, k, params)
            last = scores[:, -1].astype(np.float64)
            lengths = np.sqrt(np.einsum("ij,ij->i", queries, queries, dtype=np.float64))
            if metric == "l2":
                bound = self.scale * np.sqrt(last) * (1 - off) - self.gap - lacks - off * (lengths + size)
            else:
                products = queries.astype(np.float64) @ self.centre + self.scale * scale[:, 0] * last
                bound = products + lengths * (self.gap + off * size) + lacks * self.reach
        bound[found[:, -1] < 0] = np.nan
        return bound, found


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
        # Of searches that the bytes could not answer. Readers write these at the same time: a count that is lost
        # costs a search that takes longer.
        self._failed = self._rest = 0

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
                self._codes = Codes(kept, self._expected)
            return
        codes.append(vectors)
        if codes.gap > 2 * codes.fits and len(kept) >= 2 * codes.learnt:
            self._codes = Codes(kept, self._expected)  # what has come is unlike what was first

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
        if self._rest > 0:
            self._rest -= 1
            return super().search(allowed, queries, k, rows)
        bound, found = codes.nearest(allowed, queries, several, self._metric, rows)
        found.sort(axis=1)  # of equal rows the first is taken, as where all are read
        scores, best = ranking.rank(np, self._kept.first(rows), None, queries, found, k, self._metric)
        worst = scores[:, -1].astype(np.float64)
        if self._metric == "l2":
            worst = -np.sqrt(worst) * (1 + ranking.rounding(self._dim))
            bound = -bound
        certain = worst > bound  # no other row is as good as the worst of these
        unsure = np.flatnonzero(~certain)
        if len(unsure):
            self._failed += 1
            self._rest = min(1 << self._failed, _LONGEST_REST)
            scores[unsure], best[unsure] = super().search(allowed, queries[unsure], k, rows)
        else:
            self._failed = 0
        return scores, best
