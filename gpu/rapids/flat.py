"""The exact index kind: the vectors themselves. See `headrace.gpu.backend.IndexKind`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy as cp

from headrace.gpu import archive
from headrace.gpu.host import flat as host
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.rapids import kept, scan

__all__ = ["Index", "build", "efforts", "extension", "load", "nbytes", "save", "search", "vectors"]

Array = Any


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """The kept vectors.

    Attributes
    ----------
    metric : one of `headrace.gpu.backend.METRICS`
    rows : float32 or float16, (n, dim)
    prepared : headrace.gpu.rapids.scan.Prepared or None
        By `scan.prepare`, where the rows are float32.
    """

    metric: str
    rows: Array
    prepared: scan.Prepared | None


def build(vectors: Array, metric: str, params: BuildParams, *, threads: int = 1) -> Index:
    """Keep the vectors: a copy where they have another dtype or are not row by row, else the array itself.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    return _over(kept.stored(vectors, params.dtype), metric)


def search(index: Index, allowed: Array | None, queries: Array, k: int, *, effort: int) -> tuple[Array, Array]:
    """Exact, whatever the effort; see `headrace.gpu.rapids.scan`."""
    return scan.search(index.rows, index.prepared, allowed, queries, k, index.metric)


def extension(index: Index) -> None:
    """None: there is nothing that building takes."""


def efforts(index: Index, k: int) -> tuple[int, ...]:
    """There is only one."""
    return (0,)


def vectors(index: Index, rows: Array) -> Array:
    """The kept vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows].astype(cp.float32, copy=False)


def nbytes(index: Index) -> dict[str, int]:
    """Bytes on the device by purpose: only vectors, for l2 with their lengths."""
    lengths = 4 * len(index.rows) if index.metric == "l2" and index.prepared is not None else 0
    return {"vectors": int(index.rows.nbytes) + lengths}


def save(index: Index, path: Path) -> None:
    """Write the index to `path`; raises `BackendError` if it cannot be written."""
    archive.write(path, "flat", index.metric, cp.asnumpy(index.rows))


def load(path: Path) -> Index:
    """Read an index written by `save`, here or by the host.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    if not archive.is_archive(path):
        rebuilt: Index = kept.rebuilt(host, path, "flat", build)
        return rebuilt
    parts = archive.read(path, "flat")
    return _over(cp.asarray(parts["vectors"]), str(parts["metric"]))


def _over(rows: Array, metric: str) -> Index:
    return Index(metric, rows, scan.prepare(rows, metric) if rows.dtype == cp.float32 else None)
