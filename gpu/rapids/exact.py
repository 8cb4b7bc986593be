"""Exact search with cuVS."""

from __future__ import annotations

from typing import Any

from headrace.gpu.rapids import scan

__all__ = ["search"]

Array = Any


def search(vectors: Array, allowed: Array | None, queries: Array, k: int, metric: str) -> tuple[Array, Array]:
    """The `k` best allowed rows for each query; see `headrace.gpu.backend.Exact.search`."""
    return scan.search(vectors, None, allowed, queries, k, metric)
