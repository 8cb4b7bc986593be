"""Vectors in the order in which they come, searched exactly: what a growing segment keeps, on any device."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from headrace.gpu.buffers import Buffer

if TYPE_CHECKING:
    from headrace.gpu.backend import Exact

__all__ = ["GrowingVectors"]

Array = Any


class GrowingVectors:
    """Rows that are only appended to.

    One writer; any number of readers, of as many rows as they know to be there.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    exact : Exact
    dim : int
    dtype : {"float32", "float16"}
        How vectors are kept.
    metric : one of `headrace.gpu.backend.METRICS`
    expected : int
        Rows that will probably come.
    """

    def __init__(self, xp: ModuleType, exact: Exact, dim: int, dtype: str, metric: str, expected: int) -> None:
        self._xp, self._exact, self._metric = xp, exact, metric
        self._kept = Buffer(xp, dtype, (dim,), expected=expected)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return self._kept.nbytes

    def growth(self, more: int) -> int:
        """Bytes that appending `more` rows would add to `nbytes`."""
        return self._kept.growth(more)

    def append(self, vectors: Array) -> None:
        """Write rows, float32 or float16 (n, dim), behind the last one."""
        self._kept.append(self._xp.asarray(vectors))

    def search(self, allowed: Array | None, queries: Array, k: int, rows: int) -> tuple[Array, Array]:
        """The `k` best allowed ones of the first `rows` rows; see `headrace.gpu.backend.Exact.search`."""
        return self._exact.search(self._kept.first(rows), allowed, queries, k, self._metric)

    def take(self, rows: Array) -> Array:
        """A copy of some rows, float32 (r, dim), in that order."""
        return self._kept.take(self._xp.asarray(rows)).astype(self._xp.float32, copy=False)
