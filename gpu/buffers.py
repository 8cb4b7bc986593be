"""Arrays that are only appended to, so that a slice taken once never changes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ["Buffer"]

Array = Any


class Buffer:
    """Rows of one dtype in memory that grows in large steps: appending costs the same however many rows there are.

    One writer. Rows are written behind those that any slice covers, and a buffer that is too small is copied, so a
    reader's slice stays as it was.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    dtype
        Of the elements.
    width : tuple of int
        Shape of one row; () for a plain column.
    expected : int
        Rows that will probably come: no more than these are reserved ahead.
    """

    def __init__(self, xp: ModuleType, dtype: Any, width: tuple[int, ...] = (), *, expected: int = 1024) -> None:
        self._xp, self._expected = xp, max(1, expected)
        self._rows = xp.empty((min(1024, self._expected), *width), dtype=dtype)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def nbytes(self) -> int:
        """Bytes reserved."""
        return int(self._rows.nbytes)

    def growth(self, more: int) -> int:
        """Bytes that appending `more` rows would add to `nbytes`."""
        return (self._capacity(self._count + more) - len(self._rows)) * int(self._rows[:1].nbytes)

    def _capacity(self, rows: int) -> int:
        capacity = len(self._rows)
        if rows <= capacity:
            return capacity
        if rows <= self._expected:
            # In few steps: copying what is there costs more than reserving what will probably be needed.
            return min(max(rows, 4 * capacity), self._expected)
        return max(rows, 2 * capacity)

    def append(self, values: Array) -> None:
        """Write rows behind the last one."""
        first, last = self._count, self._count + len(values)
        capacity = self._capacity(last)
        if capacity > len(self._rows):
            larger = self._xp.empty((capacity, *self._rows.shape[1:]), dtype=self._rows.dtype)
            larger[:first] = self._rows[:first]
            self._rows = larger
        self._rows[first:last] = values
        self._count = last

    def first(self, count: int | None = None) -> Array:
        """The first `count` rows (all), without a copy; not to be written to."""
        return self._rows[: self._count if count is None else count]

    def take(self, rows: Array) -> Array:
        """A copy of some rows, in that order."""
        return self._rows[rows]
