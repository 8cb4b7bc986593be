"""K-means, trained by cuML."""

from __future__ import annotations

from typing import Any

import cupy as cp
from cuml.cluster import KMeans

from headrace.gpu.nearest import Nearest, check_training, train_few
from headrace.gpu.nearest import assign as assign_over

__all__ = ["assign", "nearest", "train"]

Array = Any


def train(sample: Array, cells: int, *, seed: int = 0, iterations: int = 20, init: Array | None = None) -> Array:
    """Centroids of the sample; see `headrace.gpu.backend.KMeans.train`.

    Raises
    ------
    BackendError
        The sample is empty, or `init` has another shape than the centroids asked for.
    """
    check_training(sample, cells, init)
    if len(sample) <= cells:
        return train_few(cp, sample, cells, iterations, init)
    # cuVS has a k-means too, but its parameters have no seed.
    machine = KMeans(
        n_clusters=cells,
        max_iter=iterations,
        random_state=seed,
        init="scalable-k-means++" if init is None else cp.ascontiguousarray(init, dtype=cp.float32),
        n_init=1,
        output_type="cupy",
    )
    machine.fit(cp.ascontiguousarray(sample, dtype=cp.float32))
    return cp.asarray(machine.cluster_centers_, dtype=cp.float32)


def assign(vectors: Array, centroids: Array) -> tuple[Array, Array]:
    """Nearest centroid and squared distance; see `headrace.gpu.nearest.assign`."""
    return assign_over(cp, vectors, centroids)


def nearest(centroids: Array) -> Nearest:
    """The same for centroids that are asked often."""
    return Nearest(cp, centroids)
