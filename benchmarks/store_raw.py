"""What the store is held against: the raw library's graph, with nothing around it."""

from __future__ import annotations

import time
from typing import Any

import faiss as typed_faiss
import numpy as np
import numpy.typing as npt

from benchmarks.store_recall import Floats, Ints
from headrace.gpu.backend import Backend
from headrace.gpu.index_spec import IndexSpec, build_params

__all__ = ["METRIC", "K", "RawGraph", "RawKind"]

# The stubs that come with FAISS lack half of what is used here.
faiss: Any = typed_faiss

K = 10
METRIC = "cosine"


class RawGraph:
    """FAISS's HNSW with nothing around it.

    Attributes
    ----------
    seconds : float
        What the build took.
    params : BuildParams
        What it was built with: what a store takes for one segment of as many rows.
    """

    name = "raw FAISS HNSW"

    def __init__(self, backend: Backend, rows: Floats, threads: int) -> None:
        self.params = build_params(IndexSpec("graph"), *rows.shape)
        began = time.perf_counter()
        self.index = self._build(backend, rows, threads)
        self.seconds = time.perf_counter() - began

    def search(self, queries: Floats, effort: int, allowed: npt.NDArray[np.bool_] | None = None, k: int = K) -> Ints:
        """Ids of the `k` nearest rows, int64 (q, k)."""
        parameters = faiss.SearchParametersHNSW(efSearch=effort)
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            parameters = faiss.SearchParametersHNSW(efSearch=effort, sel=faiss.IDSelectorBitmap(bits))
        found: Ints = self.index.search(queries, k, params=parameters)[1]
        return found

    def _build(self, backend: Backend, rows: Floats, threads: int) -> Any:
        index = faiss.IndexHNSWFlat(rows.shape[1], self.params.graph_degree, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = self.params.graph_effort
        index.add(rows)  # as many threads as this thread's OpenMP was told
        return index


class RawKind(RawGraph):
    """On RAPIDS, where our twin is a thin layer over cuVS: its graph, with no store around it."""

    name = "the backend's graph alone"

    def search(self, queries: Floats, effort: int, allowed: npt.NDArray[np.bool_] | None = None, k: int = K) -> Ints:
        xp = self._backend.xp
        bits = None if allowed is None else xp.asarray(allowed)
        rows = self._backend.kinds["graph"].search(self.index, bits, xp.asarray(queries), k, effort=effort)[1]
        return np.asarray(rows.get() if hasattr(rows, "get") else rows, dtype=np.int64)

    def _build(self, backend: Backend, rows: Floats, threads: int) -> Any:
        self._backend = backend
        return backend.kinds["graph"].build(backend.xp.asarray(rows), METRIC, self.params, threads=threads)
