"""K-means, trained by FAISS."""

from __future__ import annotations

import faiss
import numpy as np
import numpy.typing as npt

from headrace.gpu.nearest import Nearest, check_training, train_few
from headrace.gpu.nearest import assign as assign_over

__all__ = ["assign", "nearest", "train"]

_Floats = npt.NDArray[np.float32]


def train(sample: _Floats, cells: int, *, seed: int = 0, iterations: int = 20, init: _Floats | None = None) -> _Floats:
    """Centroids of the sample; see `headrace.gpu.backend.KMeans.train`.

    Raises
    ------
    BackendError
        The sample is empty, or `init` has another shape than the centroids asked for.
    """
    check_training(sample, cells, init)
    n, dim = sample.shape
    if n <= cells:
        return np.asarray(train_few(np, sample, cells, iterations, init))
    # FAISS would warn on stderr about small samples and cut down large ones; both are the caller's business.
    machine = faiss.Kmeans(
        dim, cells, niter=iterations, nredo=1, seed=seed, min_points_per_centroid=1, max_points_per_centroid=n
    )
    start = None if init is None else np.ascontiguousarray(init, dtype=np.float32)
    machine.train(np.ascontiguousarray(sample, dtype=np.float32), init_centroids=start)
    return np.array(machine.centroids, dtype=np.float32)


def assign(vectors: _Floats, centroids: _Floats) -> tuple[npt.NDArray[np.int32], _Floats]:
    """Nearest centroid and squared distance; see `headrace.gpu.nearest.assign`."""
    return assign_over(np, vectors, centroids)


def nearest(centroids: _Floats) -> Nearest:
    """The same for centroids that are asked often."""
    return Nearest(np, centroids)
