"""Rows side by side: growing segments that are appended to, and sealed ones that never change.

Both keep the same columns. What may still change about a row, whether it is alive and its cell's number, lies beside
them (`headrace.gpu.marks`). A `SegmentView` is one moment of both: a search that holds one sees that moment.
"""

from __future__ import annotations

import itertools
import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array, Backend, Extension
from headrace.gpu.calibrate import EXACT, Calibration
from headrace.gpu.columns import Columns
from headrace.gpu.ids import IdColumn
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.rows import Id
from headrace.gpu.versions import VersionBuffer, Versions

__all__ = ["Growing", "Sealed", "Segment", "SegmentView", "View"]

log = logging.getLogger("headrace.gpu")

_FEW_ROWS = 4096  # of which an exact search takes no longer than one by an index

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
        self.ids = IdColumn(ids)
        self.columns = Columns(backend.xp)
        self._versions = VersionBuffer(expected)
        self._vectors = backend.growing.vectors(dim, dtype, metric, expected)

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
        self._vectors.append(vectors)
        return first

    def growth(self, ids: Sequence[Id], attributes: Mapping[str, Sequence[Any]]) -> int:
        """Bytes that appending rows with these ids and attributes would add to `nbytes`, texts included."""
        more = len(ids)
        fixed = self._vectors.growth(more) + self._versions.growth(more)
        return fixed + self.ids.growth(ids) + self.columns.growth(attributes, more)

    def search(
        self, allowed: Array | None, queries: Array, k: int, recall_target: float, rows: int
    ) -> tuple[Array, Array]:
        return self._vectors.search(allowed, queries, k, rows)

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> Array:
        return self._vectors.take(rows)

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
    uid : str, optional
        Of the segment it was loaded from; by default a new one.

    Attributes
    ----------
    uid : str
        32 hexadecimal digits by which it is known in snapshots.
    extends : bool
        It has an `extension`.
    kept : dict of str to (str, float or None)
        URLs of the places where this process knows it to be kept, its manifest's checksum there, and when this process
        last read its files there through (`time.monotonic`; None: never).
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
        *,
        uid: str = "",
    ) -> None:
        super().__init__()
        self.uid = uid or uuid.uuid4().hex
        self.kept: dict[str, tuple[str, float | None]] = {}
        self._kind = backend.kinds[params.kind]
        self._xp = backend.xp
        self.params, self.index, self.calibration = params, index, calibration
        self.extends = self.extension is not None
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

    @property
    def extension(self) -> Extension | None:
        """See `headrace.gpu.backend.IndexKind.extension`."""
        return self._kind.extension(self.index)

    def promise(self, recall_target: float) -> dict[str, Any]:
        """What a search gets: its calibrated ``recall``, the ``effort`` (None: it is exact), and ``reached``: the
        highest recall that any effort was seen to reach.
        """
        effort = self.calibration.effort(recall_target)
        exact = effort in (0, EXACT)
        recall = round(self.calibration.recall(effort), 4)
        return {"recall": recall, "effort": None if exact else effort, "reached": round(self.calibration.best, 4)}

    def warn(self, recall_target: float) -> None:
        """Say so in the log if no effort was seen to reach the target; to be called once."""
        if self.calibration.best < recall_target:
            log.log(
                logging.WARNING if len(self) >= _FEW_ROWS else logging.DEBUG,
                "segment %s, %d rows behind %s: the highest effort tried, %d, reaches a recall of %.3f, not %g. It is "
                "searched exactly, which takes longer: ask for less (recall_target), build better (%s), or take "
                "index='flat'",
                self.uid[:8],
                len(self),
                self.params.kind,
                self.calibration.pairs[-1][0],
                self.calibration.best,
                recall_target,
                "more graph_degree and graph_effort" if self.params.kind == "graph" else "more pq_dim and pq_bits",
            )

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
    moved : mapping of int to int
        Topic partition to the offset behind the last record that took a row away from here because its id lives
        elsewhere now. Who lacks one of these records may not know yet of a row that is not here any more.
    """

    segments: tuple[SegmentView, ...]
    stamp: Mapping[int, int]
    rows: int
    moved: Mapping[int, int]
