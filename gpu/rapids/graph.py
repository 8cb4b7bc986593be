"""Approximate search over rows that never change: cuVS CAGRA with full vectors.

Graphs are built, never extended: rows that are added to a finished graph are found less often, above all when they are
like each other, which is what routing by centroids produces.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from cuvs.neighbors import cagra, filters

from headrace.gpu import ranking
from headrace.gpu.errors import BackendError
from headrace.gpu.rapids import flat

__all__ = ["build", "load", "nbytes", "save", "search", "vectors"]

Array = Any

_FEW_ROWS = 1024
_MAX_ITOPK = 512
_SAMPLINGS = 8


@dataclass(frozen=True, slots=True, eq=False)
class _Index:
    """CAGRA's index with what it refers to: it keeps views of both arrays, not the arrays.

    Attributes
    ----------
    metric : str
    dim : int
    rows : float32 (n, padded dim)
        The vectors, with zeros up to a multiple of 16 bytes: CAGRA would hold a second, padded copy otherwise.
    links : uint32 (n, degree) or None
        The graph, where it was read from a file.
    cagra : cuvs.neighbors.cagra.Index or None
        None for few rows: there is no graph over them, they are all scored.
    """

    metric: str
    dim: int
    rows: Array
    links: Array | None
    cagra: Any


def build(vectors: Array, metric: str, *, degree: int = 32, effort: int = 100, threads: int = 1) -> Any:
    """A CAGRA index with `degree` links per row, chosen among `effort`; see `headrace.gpu.backend.Graph.build`.

    `threads` has no meaning here: the device builds, and what little is left to the host obeys OMP_NUM_THREADS.

    Raises
    ------
    BackendError
        There are no vectors.
    """
    n, dim = vectors.shape
    if n == 0:
        raise BackendError("cannot build a graph over 0 vectors: give at least one")
    rows = _padded(vectors)
    if n < _FEW_ROWS:
        return _Index(metric, dim, rows, None, None)
    params = cagra.IndexParams(
        metric=_metric(metric), intermediate_graph_degree=max(effort, degree), graph_degree=degree
    )
    return _Index(metric, dim, rows, None, cagra.build(params, rows))


def search(index: Any, alive: Array, queries: Array, k: int, *, effort: int = 64) -> tuple[Array, Array]:
    """The `k` best live rows, approximately; see `headrace.gpu.backend.Graph.search`.

    The list of candidates grows as live rows become rare among those that the search walks over; where it would not fit
    into what a block of threads can hold, all live rows are scored. The same is done for single queries that come back
    with fewer rows than there are.
    """
    live = int(cp.count_nonzero(alive))
    found = min(k, live)
    if found == 0 or len(queries) == 0:
        return ranking.nothing_found(cp, len(queries), k, index.metric)
    queries = _padded(queries)
    candidates = -(-max(effort, k) * len(index.rows) // (32 * live)) * 32
    if index.cagra is None or candidates > _MAX_ITOPK:
        return flat.search(index.rows, alive, queries, k, index.metric)
    # With a single random sampling CAGRA loses recall beyond 100 K rows.
    params = cagra.SearchParams(itopk_size=candidates, num_random_samplings=_SAMPLINGS)
    allowed = filters.from_bitset(ranking.bitset(cp, alive)) if live < len(index.rows) else None
    _, near = cagra.search(params, index.cagra, queries, found, filter=allowed)
    scores, rows = ranking.rank(cp, index.rows, alive, queries, cp.asarray(near), k, index.metric)
    short = cp.flatnonzero((rows[:, :found] < 0).any(axis=1))
    if len(short):
        scores[short], rows[short] = flat.search(index.rows, alive, queries[short], k, index.metric)
    return scores, rows


def vectors(index: Any, rows: Array) -> Array:
    """The stored vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows, : index.dim]


def nbytes(index: Any) -> int:
    """Bytes the index holds on the device: vectors and links."""
    links = 0 if index.cagra is None else len(index.rows) * int(index.cagra.graph_degree) * 4
    return int(index.rows.nbytes) + links


def save(index: Any, path: Path) -> None:
    """Write the index to `path`: metric, vectors and links as NumPy arrays.

    The format of `cagra.save` holds for one release of cuVS only and does not tell the metric.

    Raises
    ------
    BackendError
        The file cannot be written.
    """
    links = np.empty((0, 0), dtype=np.uint32) if index.cagra is None else index.cagra.graph.copy_to_host()
    try:
        with path.open("wb") as file:
            np.savez(file, metric=np.array(index.metric), rows=cp.asnumpy(vectors(index, slice(None))), links=links)
    except OSError as error:
        raise BackendError(
            f"cannot write the index to {path}: check the folder and its free space ({error})"
        ) from error


def load(path: Path) -> Any:
    """Read an index written by `save`.

    Raises
    ------
    BackendError
        The file is missing, cut short, or holds something else.
    """
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as parts:
            metric, given, links = str(parts["metric"]), parts["rows"], parts["links"]
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise BackendError(f"cannot read an index from {path}: restore it or build it again ({error})") from error
    rows = _padded(cp.asarray(given))
    if links.size == 0:
        return _Index(metric, given.shape[1], rows, None, None)
    links = cp.asarray(links)
    return _Index(metric, given.shape[1], rows, links, cagra.from_graph(links, rows, metric=_metric(metric)))


def _metric(metric: str) -> str:
    return "sqeuclidean" if metric == "l2" else "inner_product"


def _padded(matrix: Array) -> Array:
    """Float32, row by row, with zeros up to a multiple of four numbers; these change neither products nor distances."""
    n, dim = matrix.shape
    if dim % 4 == 0:
        return cp.ascontiguousarray(matrix, dtype=cp.float32)
    padded = cp.zeros((n, -(-dim // 4) * 4), dtype=cp.float32)
    padded[:, :dim] = matrix
    return padded
