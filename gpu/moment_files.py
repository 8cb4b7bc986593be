"""What may still change about a store's rows, as one file: which sealed rows are alive, their cells, and the growing
rows whole. Together with the sealed segments' folders it is one view of a store.

An ``.npz`` of plain arrays; ``about`` is JSON. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Backend
from headrace.gpu.columns import Columns
from headrace.gpu.errors import SnapshotDamaged, SnapshotError
from headrace.gpu.ids import IdColumn
from headrace.gpu.marks import Marks
from headrace.gpu.npz_files import arrays_of
from headrace.gpu.reading import to_host
from headrace.gpu.row_arrays import columns_from, ids_from, of_columns, of_ids, of_versions, versions_from
from headrace.gpu.rows import Action, Batch
from headrace.gpu.segments import Sealed, SegmentView
from headrace.gpu.versions import Versions

__all__ = ["Description", "Moment", "Rows", "batches", "load", "save"]

_FORMAT = 1
_CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Description:
    """What rows a store takes: two that differ do not belong to one collection.

    Attributes
    ----------
    dim : int
    metric : one of `headrace.gpu.backend.METRICS`
    ids : {"string", "integer"}
    """

    dim: int
    metric: str
    ids: str

    def __str__(self) -> str:
        return f"{self.dim} numbers, metric {self.metric}, {self.ids} ids"


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that are nobody's segment.

    Attributes
    ----------
    ids : IdColumn
    versions : Versions
    vectors : float32 or float16, (n, dim), on the host
    columns : Columns
        On the host when loaded.
    """

    ids: IdColumn
    versions: Versions
    vectors: npt.NDArray[Any]
    columns: Columns

    def vectors_of(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        return self.vectors[rows].astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Moment:
    """What the file says.

    Attributes
    ----------
    about : Description
    marks : mapping of str to Marks
        Of each sealed segment that had live rows, by its uid.
    growing : Rows
        All live rows that were in growing segments.
    cells : int32 (n,)
        Of these.
    """

    about: Description
    marks: Mapping[str, Marks]
    growing: Rows
    cells: npt.NDArray[np.int32]


def save(
    about: Description,
    dtype: str,
    sealed: Mapping[str, Marks],
    growing: Sequence[SegmentView],
    backend: Backend,
    file: Path,
) -> None:
    """Write one moment to `file`, a path of any name.

    Parameters
    ----------
    about : Description
    dtype : {"float32", "float16"}
        In which growing rows keep their vectors.
    sealed : mapping of str to Marks
        By the segments' uids.
    growing : sequence of SegmentView
        Of the same view.

    Raises
    ------
    OSError
        It cannot be written.
    """
    arrays: dict[str, Any] = {}
    for number, marks in enumerate(sealed.values()):
        arrays[f"alive-{number}"] = np.packbits(marks.alive)
        arrays[f"cells-{number}"] = marks.cells
    rows, cells = _growing(about, dtype, growing, backend)
    arrays |= {"cells": cells, "vectors": rows.vectors}
    arrays |= {**of_versions(rows.versions), **of_ids(rows.ids), **of_columns(rows.columns)}
    written = {
        "format": _FORMAT,
        "dim": about.dim,
        "metric": about.metric,
        "ids": about.ids,
        "rows": len(cells),
        "schema": dict(rows.columns.schema),
        "sealed": [{"uid": uid, "rows": len(marks)} for uid, marks in sealed.items()],
    }
    arrays["about"] = np.frombuffer(json.dumps(written).encode(), dtype=np.uint8)
    with file.open("wb") as stream:  # NumPy would add .npz to a name
        np.savez(stream, **arrays)


def load(file: Path, name: str) -> Moment:
    """Read what `save` wrote, once its checksum has been compared; `name` is the file's, for messages.

    Raises
    ------
    SnapshotDamaged
        It holds something else.
    SnapshotError
        It is of another format.
    """
    try:
        arrays = arrays_of(file)
        about = json.loads(arrays["about"].tobytes())
        if about["format"] != _FORMAT:
            raise SnapshotError(f"{name} is written in format {about['format']!r}, this Headrace reads {_FORMAT}")
        marks = {}
        for number, segment in enumerate(about["sealed"]):
            alive = np.unpackbits(arrays[f"alive-{number}"], count=segment["rows"]).astype(np.bool_)
            marks[segment["uid"]] = Marks(alive, arrays[f"cells-{number}"])
        count = about["rows"]
        rows = Rows(
            ids_from(arrays, about["ids"]),
            versions_from(arrays),
            arrays["vectors"],
            columns_from(arrays, about["schema"], count, np),
        )
        if not len(rows.ids) == len(rows.versions) == len(rows.vectors) == len(arrays["cells"]) == count:
            raise ValueError(f"its columns are not all of {count} rows")
        return Moment(Description(about["dim"], about["metric"], about["ids"]), marks, rows, arrays["cells"])
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise SnapshotDamaged(f"{name} is not a part of a snapshot: take another snapshot ({error!r})") from error


def batches(source: Sealed | Rows, cells: npt.NDArray[np.int32], rows: npt.NDArray[np.int64]) -> Iterator[Batch]:
    """Some rows, each to be held, in batches for `headrace.gpu.store.Store.apply`.

    Parameters
    ----------
    source : Sealed or Rows
    cells : int32 (n,)
        Of all rows of the source.
    rows : int64 (r,)
    """
    for start in range(0, len(rows), _CHUNK):
        some = rows[start : start + _CHUNK]
        versions = source.versions.take(some)
        attributes = source.columns.rows(some)
        yield Batch(
            source.ids.to_list(some),
            versions.topic_partitions,
            versions.offsets,
            versions.timestamps,
            cells[some],
            np.full(len(some), int(Action.HOLD), dtype=np.uint8),
            to_host(source.vectors_of(some)),
            {name: [row.get(name) for row in attributes] for name in source.columns.schema},
        )


def _growing(
    about: Description, dtype: str, parts: Sequence[SegmentView], backend: Backend
) -> tuple[Rows, npt.NDArray[np.int32]]:
    """Live rows of growing segments and their cells. A segment may get more rows meanwhile; they are not looked at."""
    live = [(part, np.flatnonzero(part.alive)) for part in parts]
    vectors = np.empty((sum(len(rows) for _, rows in live), about.dim), dtype=dtype)
    at = 0
    for part, rows in live:
        vectors[at : at + len(rows)] = to_host(part.segment.vectors_of(rows))
        at += len(rows)
    none = np.empty(0, dtype=np.int64)
    gathered = Rows(
        IdColumn.gather([(IdColumn(about.ids), none), *((part.segment.ids, rows) for part, rows in live)]),
        Versions.concatenate([Versions.unknown(0), *(part.segment.versions.take(rows) for part, rows in live)]),
        vectors,
        Columns.gather(backend.xp, [(part.segment.columns, rows) for part, rows in live]),
    )
    return gathered, np.concatenate([np.empty(0, dtype=np.int32), *(part.cells[rows] for part, rows in live)])
