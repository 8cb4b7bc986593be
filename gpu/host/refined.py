"""Bytes first, then the vectors of what looks best, in one call of FAISS: what a lone query pays for is the calls.

After a few milliseconds without a search the processor has other things in its caches, and what Python does takes two
to ten times as long as when it is timed in a loop. So what `headrace.gpu.host.growing` does in a dozen steps FAISS does
in one (`IndexRefine`): one query over 8,000 rows of 384 numbers takes 0.33 ms then, not 0.49. FAISS keeps to itself
what the bytes said of the worst candidate, but that is known well enough: no other row's bytes said more, and bytes are
off by little, so no other row is better than the worst candidate by more than twice that. Only where this is not enough
are the candidates' bytes looked at again.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.gpu import ranking
from headrace.gpu.host import storage
from headrace.gpu.host.storage import faiss

__all__ = ["Octets", "Refined"]

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]

_STEPS = 127
_TINY = 1e-17
_LARGE = 1e15


class Octets(Protocol):
    """Vectors in a byte a number, less 128, from a centre; see `headrace.gpu.host.growing.Codes`.

    Attributes
    ----------
    centre : float32 (dim,)
    scale : float
        What 1 stands for.
    gap : float
        No vector is farther from what its bytes say.
    reach : float
        What bytes say is never farther from the centre.
    size : float
        No vector is longer.
    """

    centre: _Floats
    scale: float
    gap: float
    reach: float

    @property
    def size(self) -> float: ...

    def view(self, rows: int) -> Any:
        """FAISS's index over the first `rows` rows."""

    def take(self, rows: _Ints) -> npt.NDArray[np.uint8]:
        """The bytes of some rows."""


class Refined:
    """Some rows, for searches by inner product; never changes.

    Parameters
    ----------
    octets : Octets
        What is known of them may grow meanwhile: that makes searches less certain, never wrong.
    vectors : float32 (n, dim)
        The first rows; the array must outlive this.
    """

    __slots__ = ("_index", "_octets", "_off")

    def __init__(self, octets: Octets, vectors: _Floats) -> None:
        self._octets = octets
        self._index = faiss.IndexRefine(octets.view(len(vectors)), storage.over(vectors, "ip"))
        self._off = 4 * ranking.rounding(vectors.shape[1])

    def search(self, queries: _Floats, k: int, several: int) -> tuple[_Floats, _Ints] | None:
        """The `k` rows with the largest inner products; None where these cannot be told for certain.

        Parameters
        ----------
        queries : float32 (1, dim)
        k : int
        several : int
            Rows that are scored by their vectors: more than `k`, and no more than there are.

        Returns
        -------
        scores : float32 (1, k)
        rows : int64 (1, k)
            Of equal rows the first come first.
        """
        octets = self._octets
        largest = max(float(queries.max()), -float(queries.min()))
        if not (_TINY < largest < _LARGE and octets.size < _LARGE):
            return None
        scale = math.ldexp(1.0, math.frexp(_STEPS / largest)[1] - 1)  # a power of two: nothing is rounded by it
        asked = queries * np.float32(scale)
        scores, rows = storage.search(self._index, asked, several, None)
        query = asked[0]
        whole = np.trunc(query)  # as FAISS makes bytes of a query
        lacks = query - whole
        length, lacking = (math.sqrt(float(np.dot(some, some))) * (1 + self._off) for some in (query, lacks))
        off = length * octets.gap + lacking * octets.reach + self._off * length * octets.size
        best = scores[0, : k + 1].tolist()
        if not best[k - 1] - float(scores[0, -1]) > 2 * off:
            worst = float(((octets.take(rows[0]).astype(np.float32) - 128) @ whole).min())
            if not best[k - 1] > float(np.dot(query, octets.centre)) + octets.scale * worst + off:
                return None
        if len(set(best)) <= k:  # equal ones come in any order, and all that equal the last of the best are here
            order = np.lexsort((rows[0], -scores[0]))[:k]
            scores, rows = scores[:, order], rows[:, order]
        return scores[:, :k] * np.float32(1 / scale), rows[:, :k]
