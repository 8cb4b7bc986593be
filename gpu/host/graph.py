"""Approximate search over rows that never change: FAISS HNSW with full vectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np
import numpy.typing as npt

from headrace.gpu.errors import BackendError
from headrace.gpu.host import flat

__all__ = ["build", "load", "nbytes", "save", "search", "vectors"]

# The stubs that come with FAISS lack half of what is used here.
faiss: Any = typed_faiss

_Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

_VISIT = 8


def build(vectors: _Floats, metric: str, *, degree: int = 32, effort: int = 100, threads: int = 1) -> Any:
    """An HNSW index with `degree` links per row (twice as many on its lowest level); see `headrace.gpu.backend.Graph`.

    Raises
    ------
    BackendError
        There are no vectors.
    """
    if len(vectors) == 0:
        raise BackendError("cannot build a graph over 0 vectors: give at least one")
    kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexHNSWFlat(vectors.shape[1], degree, kind)
    index.hnsw.efConstruction = effort
    before = faiss.omp_get_max_threads()
    # OpenMP keeps this number per calling thread: no other thread's searches are slowed down meanwhile.
    faiss.omp_set_num_threads(threads)
    try:
        index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    finally:
        faiss.omp_set_num_threads(before)
    return index


def search(index: Any, alive: _Bools, queries: _Floats, k: int, *, effort: int = 64) -> tuple[_Floats, _Ints]:
    """The `k` best live rows, approximately; see `headrace.gpu.backend.Graph.search`.

    HNSW walks over dead rows as over live ones and stops after efSearch steps, so with a share f of live rows it sees
    f * efSearch of them: at f = 0.05 and efSearch 64 recall falls to 0.8, at 0.01 most queries get fewer than `k` rows.
    Therefore efSearch grows with 1/f, and where walking that far costs more than scoring every live row, the live rows
    are scored. The same is done for single queries that still come back short (rows out of reach of the walk).
    """
    metric = "l2" if index.metric_type == faiss.METRIC_L2 else "ip"
    live = int(np.count_nonzero(alive))
    wanted = min(k, live)
    steps = math.ceil(max(effort, k) * index.ntotal / live) if live else 0
    if live <= _VISIT * steps:
        return flat.search(_stored(index), alive, queries, k, metric)
    parameters = faiss.SearchParametersHNSW(efSearch=steps)
    if live < index.ntotal:
        parameters = faiss.SearchParametersHNSW(
            efSearch=steps, sel=faiss.IDSelectorBitmap(np.packbits(alive, bitorder="little"))
        )
    scores, rows = index.search(np.ascontiguousarray(queries, dtype=np.float32), k, params=parameters)
    short = np.flatnonzero(np.count_nonzero(rows >= 0, axis=1) < wanted)
    if len(short):
        scores[short], rows[short] = flat.search(_stored(index), alive, queries[short], k, metric)
    scores[rows < 0] = np.inf if metric == "l2" else -np.inf
    return scores, rows


def vectors(index: Any, rows: _Ints) -> _Floats:
    """The stored vectors of `rows`, float32 (r, dim), as a copy."""
    return _stored(index)[rows]


def nbytes(index: Any) -> int:
    """Bytes the index holds: vectors, links and the tables of both."""
    graph = index.hnsw
    links = graph.neighbors.size() * 4 + graph.offsets.size() * 8 + graph.levels.size() * 4
    return int(index.ntotal * index.d * 4 + links)


def save(index: Any, path: Path) -> None:
    """Write the index to `path`.

    Raises
    ------
    BackendError
        The file cannot be written.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise BackendError(
            f"cannot write the index to {path}: check the folder and its free space ({error})"
        ) from error


def load(path: Path) -> Any:
    """Read an index written by `save`.

    Raises
    ------
    BackendError
        The file is missing, cut short, or holds no HNSW index with full vectors.
    """
    try:
        index = faiss.read_index(str(path))
    except RuntimeError as error:
        raise BackendError(f"cannot read an index from {path}: restore it or build it again ({error})") from error
    if not isinstance(index, faiss.IndexHNSWFlat):
        raise BackendError(f"{path} holds a {type(index).__name__}, not a host graph: build the index again")
    return index


def _stored(index: Any) -> _Floats:
    """The index's own vectors without a copy; valid as long as the caller holds the index."""
    storage = faiss.downcast_index(index.storage)
    view: _Floats = faiss.rev_swig_ptr(storage.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d)
    return view
