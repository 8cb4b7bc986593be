"""One number for each row, by which copies of a cell are compared row by row.

Shallow digests are over id and version, and cost nanoseconds. Deep ones are over the vector and the attributes as well;
they are made in a Python loop at some microseconds a row, so they come in small chunks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from headrace.gpu.ids import row_digests
from headrace.gpu.rows import Id
from headrace.gpu.segments import SegmentView, View

__all__ = ["DigestedRows", "digested"]

_SHALLOW, _DEEP = 1 << 16, 512


@dataclass(frozen=True, slots=True)
class DigestedRows:
    """Some rows of one segment.

    Attributes
    ----------
    cells : int32 (n,)
    digests : uint64 (n,)
    """

    cells: npt.NDArray[np.int32]
    digests: npt.NDArray[np.uint64]
    _part: SegmentView
    _rows: npt.NDArray[np.int64]

    def ids(self, wanted: npt.NDArray[np.uint64]) -> list[Id]:
        """Ids of the rows whose digests are among `wanted`."""
        return self._part.segment.ids.to_list(self._rows[np.isin(self.digests, wanted)])


def digested(view: View, cells: frozenset[int] | None, *, deep: bool) -> Iterator[DigestedRows]:
    """The live rows of one view, optionally only of some cells, in chunks. Needs no lock."""
    step = _DEEP if deep else _SHALLOW
    for part in view.segments:
        wanted = part.alive
        if cells is not None:
            wanted = wanted & np.isin(part.cells, np.fromiter(cells, dtype=np.int32, count=len(cells)))
        all_rows = np.flatnonzero(wanted)
        for start in range(0, len(all_rows), step):
            rows = all_rows[start : start + step]
            versions = part.segment.versions.take(rows)
            digests = row_digests(part.segment.ids.hashes(rows), versions.topic_partitions, versions.offsets)
            if deep:
                digests = _with_content(part, rows, digests)
            yield DigestedRows(part.cells[rows], digests, part, rows)


def _with_content(
    part: SegmentView, rows: npt.NDArray[np.int64], digests: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    vectors: Any = part.segment.vectors_of(rows)
    vectors = np.ascontiguousarray(vectors.get() if hasattr(vectors, "get") else vectors, dtype="<f4")
    keys = digests.astype("<u8")
    made = b"".join(
        hashlib.blake2b(
            vector.tobytes() + orjson.dumps(attributes, option=orjson.OPT_SORT_KEYS), digest_size=8, key=key.tobytes()
        ).digest()
        for vector, attributes, key in zip(vectors, part.segment.columns.rows(rows), keys, strict=True)
    )
    return np.frombuffer(made, dtype="<u8").astype(np.uint64)
