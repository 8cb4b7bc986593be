"""Vectors of a growing segment, in the device's memory."""

from __future__ import annotations

import cupy as cp

from headrace.gpu.growing_vectors import GrowingVectors
from headrace.gpu.rapids import exact

__all__ = ["vectors"]


def vectors(dim: int, dtype: str, metric: str, expected: int) -> GrowingVectors:
    """An empty buffer; see `headrace.gpu.backend.GrowingKind`."""
    return GrowingVectors(cp, exact, dim, dtype, metric, expected)
