"""The exact index kind: the vectors themselves. See `headrace.gpu.backend.IndexKind`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import archive
from headrace.gpu.host import exact, storage
from headrace.gpu.index_spec import BuildParams

__all__ = ["Index", "build", "efforts", "extension", "load", "nbytes", "save", "search", "vectors"]

_Floats = npt.NDArray[np.float32]
_Kept = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The kept vectors.

    Attributes
    ----------
    metric : one of `headrace.gpu.backend.METRICS`
    rows : float32 or float16, (n, dim)
    owner : object
        What else must live as long as `rows`, because the memory is its own.
    """

    metric: str
    rows: _Kept
    owner: Any = None


def build(vectors: _Kept, metric: str, params: BuildParams, *, threads: int = 1) -> Index:
    """Keep the vectors: a copy where they have another dtype or are not row by row, else the array itself.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    return Index(metric, storage.stored(vectors, params.dtype))


def search(index: Index, allowed: _Bools | None, queries: _Floats, k: int, *, effort: int) -> tuple[_Floats, _Ints]:
    """Exact, whatever the effort; see `headrace.gpu.host.exact`."""
    return exact.search(index.rows, allowed, queries, k, index.metric)


def extension(index: Index) -> None:
    """None: there is nothing that building takes."""


def efforts(index: Index, k: int) -> tuple[int, ...]:
    """There is only one."""
    return (0,)


def vectors(index: Index, rows: _Ints) -> _Floats:
    """The kept vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows].astype(np.float32, copy=False)


def nbytes(index: Index) -> dict[str, int]:
    """Bytes by purpose: only vectors."""
    return {"vectors": index.rows.nbytes}


def save(index: Index, path: Path) -> None:
    """Write the index to `path`; raises `BackendError` if it cannot be written."""
    storage.write(storage.over(index.rows, index.metric), "flat", path)


def load(path: Path) -> Index:
    """Read an index written by `save`, here or by RAPIDS.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    if archive.is_archive(path):
        parts = archive.read(path, "flat")
        return Index(str(parts["metric"]), parts["vectors"])
    index = storage.read(path, "flat")
    metric = "l2" if index.metric_type == storage.faiss.METRIC_L2 else "ip"
    return Index(metric, storage.array(index), index)
