"""The graph index kind: cuVS CAGRA over full vectors. See `headrace.gpu.backend.IndexKind`.

Graphs are built, never extended: rows that are added to a finished graph are found less often, above all when they are
like each other, which is what routing by centroids produces. Over few rows there is none: the device scores them all
in less time than a walk takes to start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np
from cuvs.neighbors import cagra

from headrace.gpu import archive, filtered, ranking
from headrace.gpu.host import graph as host
from headrace.gpu.index_spec import BuildParams
from headrace.gpu.rapids import kept, scan
from headrace.gpu.rapids.handles import handle

__all__ = ["Index", "build", "efforts", "extension", "load", "nbytes", "save", "search", "vectors"]

Array = Any

_FEW_ROWS = 2048
_LADDER = (32, 64, 96, 128, 192, 256, 384, 512)
_SAMPLINGS = 8
_ALIGNMENT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """CAGRA's index with what it refers to: it keeps views of both arrays, not the arrays.

    Attributes
    ----------
    metric : one of `headrace.gpu.backend.METRICS`
    dim : int
    rows : float32 or float16, (n, padded dim)
        The vectors, with zeros up to a multiple of 16 bytes: CAGRA would hold a second, padded copy otherwise.
    links : uint32 (n, degree) or None
        The graph, where it was read from a file.
    cagra : cuvs.neighbors.cagra.Index or None
        None for few rows.
    """

    metric: str
    dim: int
    rows: Array
    links: Array | None
    cagra: Any


def build(vectors: Array, metric: str, params: BuildParams, *, threads: int = 1) -> Index:
    """A CAGRA graph with `graph_degree` links per row, chosen among `graph_effort` near ones.

    `threads` has no meaning here: the device builds, and what little is left to the host obeys OMP_NUM_THREADS.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    n, dim = vectors.shape
    rows = _padded(kept.stored(vectors, params.dtype))
    if n < _FEW_ROWS:
        return Index(metric, dim, rows, None, None)
    near = min(max(params.graph_effort, params.graph_degree), n - 1)
    asked = cagra.IndexParams(
        metric=scan.metric_name(metric), intermediate_graph_degree=near, graph_degree=min(params.graph_degree, near)
    )
    with handle() as resources:
        graph = cagra.build(asked, rows, resources=resources)
    return Index(metric, dim, rows, None, graph)


def search(index: Index, allowed: Array | None, queries: Array, k: int, *, effort: int) -> tuple[Array, Array]:
    """The `k` best allowed rows, approximately; `effort` is CAGRA's itopk_size.

    With a filter the walk is for the nearest rows of all, as `headrace.gpu.filtered` says: CAGRA's own filter only
    drops rows that it has walked over. The list of candidates grows as allowed rows become rare; where it would not
    fit into what a block of threads can hold, all allowed rows are scored. The same is done for single queries that
    come back with fewer rows than there are.
    """
    n = len(index.rows)
    count = n if allowed is None else int(cp.count_nonzero(allowed))
    found = min(k, count)
    if found == 0 or len(queries) == 0:
        return ranking.nothing_found(cp, len(queries), k, index.metric)
    queries = _widened(queries, index.rows.shape[1])
    width = min(n, max(k, filtered.depth(k, count, n)))
    candidates = _in_lines(max(effort, k) * n / count, width)
    if index.cagra is None or candidates > _LADDER[-1]:
        return scan.search(index.rows, None, allowed, queries, k, index.metric)

    def walk(some: Array, factor: int) -> tuple[Array, Array]:
        deep = min(n, factor * width)
        near = _near(index, some, deep, _in_lines(factor * candidates, deep))
        scores, rows = ranking.rank(cp, index.rows, None, some, near, deep, index.metric)
        return (scores, rows) if count == n else filtered.keep(cp, scores, rows, allowed, k, index.metric)

    def score(some: Array) -> tuple[Array, Array]:
        return scan.search(index.rows, None, allowed, some, k, index.metric)

    # A list of one place more than the longest would not fit.
    return filtered.search(cp, queries, walk, score, found, 1 if count == n else (_LADDER[-1] + 1) / candidates)


def _in_lines(candidates: float, width: int) -> int:
    """The length of a list of candidates: whole lines of 32, and not fewer than are wanted."""
    return -(-max(math.ceil(candidates), width) // 32) * 32


def _near(index: Index, queries: Array, found: int, candidates: int) -> Array:
    # cuVS takes queries in the rows' dtype only. Rounded ones may change the order at the end of the list, so more
    # rows are asked for than are wanted; the scores are taken from the queries as they came.
    if index.rows.dtype != cp.float32:
        queries = queries.astype(index.rows.dtype)
        found = min(2 * found, candidates, len(index.rows))
    # With a single random sampling CAGRA loses recall beyond 100 K rows.
    params = cagra.SearchParams(itopk_size=candidates, num_random_samplings=_SAMPLINGS)
    with handle() as resources:
        _, near = cagra.search(params, index.cagra, queries, found, resources=resources)
    return cp.asarray(near)


def extension(index: Index) -> None:
    """None: CAGRA builds faster than it extends, and better graphs."""


def efforts(index: Index, k: int) -> tuple[int, ...]:
    """Values of itopk_size, as far as they take `k` rows."""
    worth = () if index.cagra is None else tuple(size for size in _LADDER if k <= size)
    return worth or (_LADDER[0],)


def vectors(index: Index, rows: Array) -> Array:
    """The kept vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows, : index.dim].astype(cp.float32, copy=False)


def nbytes(index: Index) -> dict[str, int]:
    """Bytes on the device by purpose: vectors, links."""
    links = 0 if index.cagra is None else len(index.rows) * int(index.cagra.graph_degree) * 4
    return {"vectors": int(index.rows.nbytes), "links": links}


def save(index: Index, path: Path) -> None:
    """Write metric, vectors and links to `path`, so that any release of cuVS, and the host, can use them.

    Raises
    ------
    BackendError
        The file cannot be written.
    """
    links = np.empty((0, 0), dtype=np.uint32) if index.cagra is None else index.cagra.graph.copy_to_host()
    archive.write(path, "graph", index.metric, cp.asnumpy(index.rows[:, : index.dim]), links=links)


def load(path: Path) -> Index:
    """Read an index written by `save`; one that the host has written is built again.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    if not archive.is_archive(path):
        rebuilt: Index = kept.rebuilt(host, path, "graph", build)
        return rebuilt
    parts = archive.read(path, "graph")
    metric, given, links = str(parts["metric"]), parts["vectors"], parts["links"]
    rows = _padded(cp.asarray(given))
    if links.size == 0:
        return Index(metric, given.shape[1], rows, None, None)
    links = cp.asarray(links)
    with handle() as resources:
        graph = cagra.from_graph(links, rows, metric=scan.metric_name(metric), resources=resources)
    return Index(metric, given.shape[1], rows, links, graph)


def _padded(rows: Array) -> Array:
    grain = _ALIGNMENT // rows.dtype.itemsize
    return _widened(rows, -(-rows.shape[1] // grain) * grain, rows.dtype)


def _widened(matrix: Array, width: int, dtype: Any = np.float32) -> Array:
    """Row by row, with zeros up to `width` numbers; these change neither products nor distances."""
    n, dim = matrix.shape
    if dim == width:
        return cp.ascontiguousarray(matrix, dtype=dtype)
    wide = cp.zeros((n, width), dtype=dtype)
    wide[:, :dim] = matrix
    return wide
