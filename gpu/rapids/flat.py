"""Exact search with cuVS."""

from __future__ import annotations

from typing import Any

import cupy as cp
from cuvs.neighbors import brute_force, filters

from headrace.gpu import ranking

__all__ = ["search"]

Array = Any


def search(vectors: Array, alive: Array, queries: Array, k: int, metric: str) -> tuple[Array, Array]:
    """The `k` best live rows for each query; see `headrace.gpu.backend.Flat.search`."""
    live = int(cp.count_nonzero(alive))
    # What cuVS returns where fewer rows are alive than asked for is not written down, so it is never asked for more.
    found = min(k, live)
    if found == 0 or len(queries) == 0:
        return ranking.nothing_found(cp, len(queries), k, metric)
    vectors, queries = cp.ascontiguousarray(vectors), cp.ascontiguousarray(queries)
    index = brute_force.build(vectors, metric="sqeuclidean" if metric == "l2" else "inner_product")
    allowed = filters.from_bitset(ranking.bitset(cp, alive)) if live < len(vectors) else None
    _, rows = brute_force.search(index, queries, found, prefilter=allowed)
    return ranking.rank(cp, vectors, alive, queries, cp.asarray(rows), k, metric)
