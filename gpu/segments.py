"""Rows side by side: one growing segment that is appended to, and sealed ones that never change.

Both keep the same columns. What may still change about a row after it was written, whether it is alive and its cell's
number, lives in a `SegmentView`, replaced as a whole, never edited: a search that holds a view sees one moment of the
store.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array, Backend
from headrace.gpu.rows import Id

__all__ = ["Growing", "Sealed", "Segment", "SegmentView", "take"]

_serial = itertools.count(1)


class Segment:
    """The columns that every segment has; whatever changes them happens under the store's lock."""

    def __init__(self, capacity: int) -> None:
        self.serial = next(_serial)
        self.count = 0
        self.ids = np.empty(capacity, dtype=object)
        self.topic_partitions = np.zeros(capacity, dtype=np.int32)
        self.offsets = np.zeros(capacity, dtype=np.int64)
        self.timestamps = np.zeros(capacity, dtype=np.int64)
        self.attributes: dict[str, npt.NDArray[np.object_]] = {}

    def version(self, row: int) -> tuple[int, int, int]:
        """Topic partition, offset and timestamp of a row."""
        return int(self.topic_partitions[row]), int(self.offsets[row]), int(self.timestamps[row])

    def attributes_of(self, row: int) -> dict[str, Any]:
        """The attributes that a row has."""
        return {name: value for name, column in self.attributes.items() if (value := column[row]) is not None}

    def search(self, alive: npt.NDArray[np.bool_], queries: Array, k: int, effort: int) -> tuple[Array, Array]:
        raise NotImplementedError

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        """Float32 (r, dim), on the backend's device."""
        raise NotImplementedError

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose. Attribute values themselves are Python objects and are not counted."""
        columns = self.topic_partitions.nbytes + self.offsets.nbytes + self.timestamps.nbytes + self.ids.nbytes
        return {"columns": columns + sum(column.nbytes for column in self.attributes.values())}


class Growing(Segment):
    """Newest rows, searched exactly; a row can be found as soon as a view with it is published."""

    def __init__(self, backend: Backend, dim: int, metric: str, capacity: int = 1024) -> None:
        super().__init__(capacity)
        self._backend, self._dim, self._metric = backend, dim, metric
        self._vectors = backend.xp.empty((capacity, dim), dtype=backend.xp.float32)

    def append(
        self,
        ids: Sequence[Id],
        topic_partitions: npt.NDArray[np.int32],
        offsets: npt.NDArray[np.int64],
        timestamps: npt.NDArray[np.int64],
        vectors: Array,
        attributes: dict[str, Sequence[Any]],
    ) -> int:
        """Write rows behind the last one; returns the first one's number.

        Rows that a published view covers are never written again: a buffer that is too small is copied, and older views
        keep the old one.
        """
        first, last = self.count, self.count + len(ids)
        self._reserve(last)
        self.ids[first:last] = ids
        self.topic_partitions[first:last] = topic_partitions
        self.offsets[first:last] = offsets
        self.timestamps[first:last] = timestamps
        self._vectors[first:last] = self._backend.xp.asarray(vectors, dtype=self._backend.xp.float32)
        for name, values in attributes.items():
            if name not in self.attributes:
                # A new dictionary: searches walk through the old one without the lock.
                self.attributes = self.attributes | {name: np.full(len(self.ids), None, dtype=object)}
            column = self.attributes[name]
            for row, value in enumerate(values, first):
                column[row] = value
        self.count = last
        return first

    def _reserve(self, rows: int) -> None:
        capacity = len(self.ids)
        if rows <= capacity:
            return
        capacity = max(rows, 2 * capacity)
        for name in ("ids", "topic_partitions", "offsets", "timestamps"):
            old = getattr(self, name)
            new = np.empty(capacity, dtype=old.dtype)
            new[: self.count] = old[: self.count]
            setattr(self, name, new)
        for name, old in self.attributes.items():
            column = np.full(capacity, None, dtype=object)
            column[: self.count] = old[: self.count]
            self.attributes[name] = column
        vectors = self._backend.xp.empty((capacity, self._dim), dtype=self._backend.xp.float32)
        vectors[: self.count] = self._vectors[: self.count]
        self._vectors = vectors

    def search(self, alive: npt.NDArray[np.bool_], queries: Array, k: int, effort: int) -> tuple[Array, Array]:
        rows = len(alive)
        xp = self._backend.xp
        return self._backend.flat.search(self._vectors[:rows], xp.asarray(alive), queries, k, self._metric)

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        return self._vectors[self._backend.xp.asarray(rows)]

    def nbytes(self) -> dict[str, int]:
        return super().nbytes() | {"vectors": int(self._vectors.nbytes)}


class Sealed(Segment):
    """Rows that never change again, behind a graph index that holds their vectors."""

    def __init__(self, backend: Backend, rows: int) -> None:
        super().__init__(rows)
        self._backend = backend
        self._index: Any = None
        self.count = rows

    def adopt(self, index: Any) -> None:
        """Take the index that was built over this segment's rows; once, before anybody sees the segment."""
        self._index = index

    def search(self, alive: npt.NDArray[np.bool_], queries: Array, k: int, effort: int) -> tuple[Array, Array]:
        return self._backend.graph.search(
            self._index, self._backend.xp.asarray(alive), queries, k, effort=max(effort, k)
        )

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        return self._backend.graph.vectors(self._index, self._backend.xp.asarray(rows))

    def nbytes(self) -> dict[str, int]:
        return super().nbytes() | {"index": self._backend.graph.nbytes(self._index)}


@dataclass(frozen=True, slots=True)
class SegmentView:
    """One moment of one segment. The arrays are never written again once a view holds them.

    Attributes
    ----------
    segment : Segment
    alive : bool (n,)
        n is the number of rows that existed at that moment.
    cells : int32 (n,)
    """

    segment: Segment
    alive: npt.NDArray[np.bool_]
    cells: npt.NDArray[np.int32]

    @property
    def live(self) -> int:
        return int(np.count_nonzero(self.alive))


def take(sources: Sequence[tuple[Segment, npt.NDArray[np.int64]]], backend: Backend, target: Segment) -> Array:
    """Copy chosen rows of several segments into `target`'s columns, in order; returns vectors, float32 (n, dim)."""
    parts = []
    at = 0
    for segment, rows in sources:
        end = at + len(rows)
        for name in ("ids", "topic_partitions", "offsets", "timestamps"):
            getattr(target, name)[at:end] = getattr(segment, name)[rows]
        for name, column in segment.attributes.items():
            if name not in target.attributes:
                target.attributes[name] = np.full(len(target.ids), None, dtype=object)
            target.attributes[name][at:end] = column[rows]
        parts.append(segment.vectors_of(rows))
        at = end
    return backend.xp.concatenate(parts)
