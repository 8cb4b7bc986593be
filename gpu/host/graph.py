"""The graph index kind: FAISS HNSW over full vectors. See `headrace.gpu.backend.IndexKind`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import filtered
from headrace.gpu.backend import Extension
from headrace.gpu.errors import BackendError
from headrace.gpu.host import exact, storage
from headrace.gpu.host.storage import faiss
from headrace.gpu.index_spec import BuildParams

__all__ = ["Index", "build", "efforts", "extension", "load", "nbytes", "save", "search", "vectors"]

_Floats = npt.NDArray[np.float32]
_Kept = npt.NDArray[np.float32] | npt.NDArray[np.float16]
_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]

_OF_CAGRA = "cagra"
_CALIBRATED = 10
_SPREAD = 1.25
_VISIT = 48
_VISIT_IN_BATCH = 96
_LADDER = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class Index:
    """An HNSW graph with its vectors; never changes.

    Parameters
    ----------
    hnsw : faiss.IndexHNSWFlat or faiss.IndexHNSWSQ
        Any HNSW of FAISS whose storage holds full vectors, float32 or float16.

    Attributes
    ----------
    metric : {"ip", "l2"}
        ip for cosine too: the scores are the same.
    rows : float32 or float16, (n, dim)
        The vectors, in memory that belongs to `hnsw`.
    """

    __slots__ = ("_parameters", "hnsw", "metric", "rows")

    def __init__(self, hnsw: Any) -> None:
        self.hnsw = hnsw
        self.metric = "l2" if hnsw.metric_type == faiss.METRIC_L2 else "ip"
        self.rows = storage.array(hnsw.storage)
        self._parameters: dict[int, Any] = {}

    def parameters(self, steps: int) -> Any:
        """FAISS's parameters of a search that keeps `steps` candidates, made once."""
        known = self._parameters.get(steps)
        if known is None:
            known = self._parameters[steps] = faiss.SearchParametersHNSW(efSearch=steps)
        return known


def build(vectors: _Kept, metric: str, params: BuildParams, *, threads: int = 1) -> Index:
    """An HNSW graph with `graph_degree` links per row, twice as many on its lowest level.

    Raises
    ------
    BackendError
        There are no vectors, or a number is too large for float16.
    """
    kept = storage.stored(vectors, params.dtype)
    dim, links, kind = vectors.shape[1], params.graph_degree, storage.faiss_metric(metric)
    if kept.dtype == np.float16:
        hnsw = faiss.IndexHNSWSQ(dim, faiss.ScalarQuantizer.QT_fp16, links, kind)
    else:
        hnsw = faiss.IndexHNSWFlat(dim, links, kind)
    hnsw.hnsw.efConstruction = params.graph_effort
    with storage.openmp(threads):
        for piece in storage.pieces(kept):
            hnsw.add(piece)
    return Index(hnsw)


def extension(index: Index) -> Extension | None:
    """FAISS's `add` to a copy of the graph: that is how it was built, so it is as good a graph in the end.

    Of 16 K rows of 384 numbers the copy takes 25 ms, the building 3.5 s. Not for a graph that CAGRA built.
    """
    return partial(_extended, index) if index.hnsw.init_level0 else None


def _extended(index: Index, vectors: _Kept, *, threads: int = 1) -> Index:
    if len(vectors) == 0:
        return index
    kept = storage.stored(vectors, str(index.rows.dtype))
    hnsw = faiss.clone_index(index.hnsw)
    with storage.openmp(threads):
        for piece in storage.pieces(kept):
            hnsw.add(piece)
    return Index(hnsw)


def search(index: Index, allowed: _Bools | None, queries: _Floats, k: int, *, effort: int) -> tuple[_Floats, _Ints]:
    """The `k` best allowed rows, approximately; `effort` is HNSW's efSearch, for up to 10 rows without a filter.

    With a filter the walk is for the nearest rows of all, as `headrace.gpu.filtered` says. With a share f of allowed
    rows these lie f times as dense, so efSearch grows with 1/f (and with `k`); where walking that far costs more than
    scoring every allowed row, these are scored.

    Measured with 20 K rows of 384 numbers at efSearch 16: growing with 1/f the recall, 0.99 without a filter, falls to
    0.94 at f = 0.1; with f to the power of -1.25 to 0.98. One by one, scoring 2,000 allowed rows takes a third of the
    walk's time, 4,000 as long; in batches, 6,000 as long.
    """
    total = len(index.rows)
    count = total if allowed is None else int(np.count_nonzero(allowed))
    if count == total:
        allowed = None
    steps = effort * max(1.0, k / _CALIBRATED)
    if allowed is not None:
        steps *= (total / max(count, 1)) ** _SPREAD
    steps = max(math.ceil(steps), k)
    visit = _VISIT if len(queries) <= exact.FEW_QUERIES else _VISIT_IN_BATCH
    if count <= visit * steps or len(queries) == 0 or k == 0:
        return exact.search(index.rows, allowed, queries, k, index.metric)
    if allowed is not None:
        return _among(index, allowed, count, queries, k, steps, count / (2 * visit * steps))
    scores, rows = storage.search(index.hnsw, queries, k, index.parameters(steps))
    if storage.short(rows):
        short = np.flatnonzero(rows[:, min(k, count) - 1] < 0)
        scores[short], rows[short] = exact.search(index.rows, None, queries[short], k, index.metric)
    return scores, rows


def _among(
    index: Index, allowed: _Bools, count: int, queries: _Floats, k: int, steps: int, most: float
) -> tuple[_Floats, _Ints]:
    """The `k` best of the allowed rows, `count` of them; queries walk at most `most` times as far as `steps`."""
    width = max(k, filtered.depth(k, count, len(index.rows)))

    def walk(some: _Floats, factor: int) -> tuple[_Floats, _Ints]:
        deep = min(factor * width, len(index.rows))
        scores, rows = storage.search(index.hnsw, some, deep, index.parameters(max(factor * steps, deep)))
        return filtered.keep(np, scores, rows, allowed, k, index.metric)

    def score(some: _Floats) -> tuple[_Floats, _Ints]:
        return exact.search(index.rows, allowed, some, k, index.metric)

    return filtered.search(np, queries, walk, score, min(k, count), most)


def efforts(index: Index, k: int) -> tuple[int, ...]:
    """Values of efSearch, as far as they are faster than scoring every row."""
    worth = tuple(steps for steps in _LADDER if k <= steps and _VISIT * steps < len(index.rows))
    return worth or (_LADDER[0],)


def vectors(index: Index, rows: _Ints) -> _Floats:
    """The kept vectors of `rows`, float32 (r, dim), as a copy."""
    return index.rows[rows].astype(np.float32, copy=False)


def nbytes(index: Index) -> dict[str, int]:
    """Bytes by purpose: vectors, links (with the tables of where they are)."""
    graph = index.hnsw.hnsw
    links = graph.neighbors.size() * 4 + graph.offsets.size() * 8 + graph.levels.size() * 4
    return {"vectors": index.rows.nbytes, "links": int(links)}


def save(index: Index, path: Path) -> None:
    """Write the index to `path`; raises `BackendError` if it cannot be written."""
    # FAISS does not write down whether it has linked the lowest level itself.
    storage.write(index.hnsw, "graph" if index.hnsw.init_level0 else _OF_CAGRA, path)


def load(path: Path) -> Index:
    """Read an index written by `save`, here or by RAPIDS: a graph that CAGRA built is searched as HNSW.

    Raises
    ------
    BackendError
        The file is missing, damaged, or of another kind.
    """
    if _is_cagra(path):
        from headrace.gpu.host.cagra_graph import load as load_cagra  # which imports this module

        return load_cagra(path)
    hnsw, kind = storage.read_one_of(path, ("graph", _OF_CAGRA))
    hnsw.init_level0 = kind != _OF_CAGRA
    return Index(hnsw)


def _is_cagra(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(2) == b"PK"
    except OSError as error:
        raise BackendError(f"cannot read an index from {path}: restore it or build it again ({error})") from error
