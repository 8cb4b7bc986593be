"""What may still change about a row after it was written: whether it is alive, and its cell's number."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Marks"]


class Marks:
    """Alive and cell of each row of one segment.

    Whoever holds `alive` and `cells` of some moment keeps that moment: rows are added behind them in the same memory,
    and killing or relabelling copies the column first. To be called under the store's lock.

    Parameters
    ----------
    alive : bool (n,), optional
    cells : int32 (n,), optional
        Both are taken over, not copied. Without them there are no rows yet.
    """

    def __init__(self, alive: npt.NDArray[np.bool_] | None = None, cells: npt.NDArray[np.int32] | None = None) -> None:
        self._alive = np.empty(0, dtype=np.bool_) if alive is None else alive
        self._cells = np.empty(0, dtype=np.int32) if cells is None else cells
        self._count = len(self._alive)
        self.live = int(np.count_nonzero(self._alive))

    def __len__(self) -> int:
        return self._count

    @property
    def alive(self) -> npt.NDArray[np.bool_]:
        """Bool (n,), as it is now."""
        return self._alive[: self._count]

    @property
    def cells(self) -> npt.NDArray[np.int32]:
        """Int32 (n,), as they are now."""
        return self._cells[: self._count]

    @property
    def nbytes(self) -> int:
        return self._alive.nbytes + self._cells.nbytes

    def append(self, cells: npt.NDArray[np.int32]) -> None:
        """Add live rows."""
        first, last = self._count, self._count + len(cells)
        if last > len(self._alive):
            capacity = max(last, 2 * len(self._alive), 256)
            self._alive = _copied(self._alive, first, capacity)
            self._cells = _copied(self._cells, first, capacity)
        self._alive[first:last] = True
        self._cells[first:last] = cells
        self._count = last
        self.live += len(cells)

    def kill(self, rows: npt.NDArray[np.int64]) -> None:
        """Rows that are alive, each named once, die."""
        self._alive = self._alive.copy()
        self._alive[rows] = False
        self.live -= len(rows)

    def revive(self, rows: npt.NDArray[np.int64]) -> None:
        """Rows that are dead, each named once, come alive."""
        self._alive = self._alive.copy()
        self._alive[rows] = True
        self.live += len(rows)

    def relabel(self, rows: npt.NDArray[np.int64], cells: npt.NDArray[np.int32]) -> None:
        """Rows get new cells."""
        self._cells = self._cells.copy()
        self._cells[rows] = cells


def _copied(old: npt.NDArray[Any], count: int, capacity: int) -> npt.NDArray[Any]:
    new = np.empty(capacity, dtype=old.dtype)
    new[:count] = old[:count]
    return new
