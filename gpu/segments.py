"""Rows side by side: growing segments that are appended to, and sealed ones that never change.

Both keep the same columns. What may still change about a row, whether it is alive and its cell's number, lies beside
them (`headrace.gpu.marks`). A `SegmentView` is one moment of both: a search that holds one sees that moment.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array, Backend
from headrace.gpu.buffers import Buffer
from headrace.gpu.calibrate import Calibration
from headrace.gpu.columns import Columns
from headrace.gpu.ids import IdColumn
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.rows import Id
from headrace.gpu.versions import VersionBuffer, Versions

__all__ = ["Growing", "Sealed", "Segment", "SegmentView", "View"]

_serial = itertools.count(1)


class Segment:
    """The columns that every segment has.

    Attributes
    ----------
    serial : int
        Of this segment in this process; no two have the same.
    ids : IdColumn
    columns : Columns
        Attributes.
    """

    ids: IdColumn
    columns: Columns

    def __init__(self) -> None:
        self.serial = next(_serial)

    @property
    def versions(self) -> Versions:
        raise NotImplementedError

    def search(
        self, allowed: Array | None, queries: Array, k: int, recall_target: float, rows: int
    ) -> tuple[Array, Array]:
        """The `k` best allowed ones of the first `rows` rows; see `headrace.gpu.backend.IndexKind.search`."""
        raise NotImplementedError

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        """Float32 (r, dim), on the backend's device."""
        raise NotImplementedError

    def nbytes(self) -> dict[str, int]:
        """Bytes by purpose: vectors (links, codes, centroids), ids, columns, versions."""
        return {"ids": self.ids.nbytes, "columns": self.columns.nbytes}


class Growing(Segment):
    """Newest rows, searched exactly; a row can be found as soon as a view with it is published.

    Parameters
    ----------
    backend : Backend
    dim : int
    metric : str
    dtype : {"float32", "float16"}
        How vectors are kept.
    ids : {"string", "integer"}
    expected : int
        Rows that will probably come.
    """

    def __init__(self, backend: Backend, dim: int, metric: str, dtype: str, ids: str, expected: int) -> None:
        super().__init__()
        self._backend, self._metric = backend, metric
        self.ids = IdColumn(ids)
        self.columns = Columns(backend.xp)
        self._versions = VersionBuffer(expected)
        self._vectors = Buffer(backend.xp, dtype, (dim,), expected=expected)

    def __len__(self) -> int:
        return len(self._vectors)

    @property
    def versions(self) -> Versions:
        return self._versions.all

    def append(
        self,
        ids: Sequence[Id],
        hashes: npt.NDArray[np.uint64],
        versions: Versions,
        vectors: Array,
        attributes: Mapping[str, Sequence[Any]],
    ) -> int:
        """Write rows behind the last one, under the store's lock; returns the first one's number.

        Raises
        ------
        RecordError
            An attribute is not of its column's kind; nothing has been written.
        """
        first = len(self)
        self.columns.append(attributes, len(ids))
        self.ids.append(ids, hashes)
        self._versions.append(versions)
        self._vectors.append(self._backend.xp.asarray(vectors))
        return first

    def growth(self, more: int) -> int:
        """Bytes that the fixed columns of `more` rows will take; ids and attributes not counted."""
        return self._vectors.growth(more) + self._versions.growth(more)

    def search(
        self, allowed: Array | None, queries: Array, k: int, recall_target: float, rows: int
    ) -> tuple[Array, Array]:
        return self._backend.exact.search(self._vectors.first(rows), allowed, queries, k, self._metric)

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        xp = self._backend.xp
        return self._vectors.take(xp.asarray(rows)).astype(xp.float32, copy=False)

    def nbytes(self) -> dict[str, int]:
        return {"vectors": self._vectors.nbytes, "versions": self._versions.nbytes, **super().nbytes()}


class Sealed(Segment):
    """Rows that never change again, behind an index that keeps their vectors.

    Parameters
    ----------
    backend : Backend
    params : BuildParams
        What `index` was built by.
    index : Any
        Of ``backend.kinds[params.kind]``.
    calibration : Calibration
        Recall by effort of this very index.
    ids, versions, columns
        Row r is row r of the index.
    """

    def __init__(
        self,
        backend: Backend,
        params: BuildParams,
        index: Any,
        calibration: Calibration,
        ids: IdColumn,
        versions: Versions,
        columns: Columns,
    ) -> None:
        super().__init__()
        self._kind = backend.kinds[params.kind]
        self._xp = backend.xp
        self.params, self.index, self.calibration = params, index, calibration
        self.ids, self._versions, self.columns = ids, versions, columns
        self._size = {**self._kind.nbytes(index), "versions": versions.nbytes, **super().nbytes()}

    def __len__(self) -> int:
        return len(self._versions)

    @property
    def versions(self) -> Versions:
        return self._versions

    def search(
        self, allowed: Array | None, queries: Array, k: int, recall_target: float, rows: int
    ) -> tuple[Array, Array]:
        return self._kind.search(self.index, allowed, queries, k, effort=self.calibration.effort(recall_target))

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        return self._kind.vectors(self.index, self._xp.asarray(rows))

    def nbytes(self) -> dict[str, int]:
        return dict(self._size)


@dataclass(frozen=True, slots=True)
class SegmentView:
    """One moment of one segment. The arrays are never written again once a view holds them.

    Attributes
    ----------
    segment : Segment
    alive : bool (n,)
        n is the number of rows that existed at that moment.
    cells : int32 (n,)
    live : int
        How many are alive.
    """

    segment: Segment
    alive: npt.NDArray[np.bool_]
    cells: npt.NDArray[np.int32]
    live: int


@dataclass(frozen=True, slots=True)
class View:
    """One moment of a store.

    Attributes
    ----------
    segments : tuple of SegmentView
    stamp : mapping of int to int
        What the writer said it had applied: topic partition to first offset not applied yet.
    rows : int
        Live rows.
    """

    segments: tuple[SegmentView, ...]
    stamp: Mapping[int, int]
    rows: int
