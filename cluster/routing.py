"""Which cell a vector belongs to."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from headrace.cluster.state import Codebook
from headrace.gpu.backend import Backend
from headrace.gpu.reading import to_host

__all__ = ["Router"]


class Router:
    """Gives vectors their cells by one codebook: each goes to the nearest centroid.

    Making one costs about as much as routing a batch of 16; keep it while the codebook stays.

    Parameters
    ----------
    codebook : Codebook
    backend : Backend

    Notes
    -----
    Immutable, so thread-safe.
    """

    def __init__(self, codebook: Codebook, backend: Backend) -> None:
        self.codebook = codebook
        self._xp = backend.xp
        only_one = len(codebook.centroids) == 1  # the first codebook's centroid says nothing
        self._nearest = None if only_one else backend.kmeans.nearest(backend.xp.asarray(codebook.centroids))

    def cells(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
        """The cell of each vector, float32 (n, dim): int32 (n,), on the host."""
        if self._nearest is None:
            return np.full(len(vectors), self.codebook.first, dtype=np.int32)
        labels: npt.NDArray[np.int32] = to_host(self._nearest.labels(self._xp.asarray(vectors)))
        labels += np.int32(self.codebook.first)
        return labels
