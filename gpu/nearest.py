"""The nearest centroid: one piece of code over NumPy and CuPy, so that both backends give a row the same cell."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

from headrace.gpu.errors import BackendError

__all__ = ["Nearest", "assign", "check_training", "train_few"]

Array = Any

_MAX_DISTANCES = 1 << 22


class Nearest:
    """Centroids made ready for being asked again and again, as ingesting small batches does.

    A vector's label does not depend on its neighbours in the batch: two copies that read the same record in different
    batches must put it into the same cell. Matrix products of different shapes differ in their last bits, so this
    counts in float64 and takes the first of the centroids that are as near as float64 can tell.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    centroids : float32 (cells, dim)

    Notes
    -----
    Immutable, so thread-safe. Takes 8 bytes for each number of the centroids.
    """

    def __init__(self, xp: ModuleType, centroids: Array) -> None:
        self._xp = xp
        self._wide = centroids.astype(xp.float64)
        self._lengths = xp.einsum("ij,ij->i", self._wide, self._wide)
        self._longest = self._lengths.max()

    def labels(self, vectors: Array) -> Array:
        """Nearest centroid of each vector, float32 (n, dim): int32 (n,)."""
        labels = self._xp.empty(len(vectors), dtype=self._xp.int32)
        for rows, part in self._pieces(vectors):
            labels[rows] = self._label(part)
        return labels

    def assign(self, vectors: Array) -> tuple[Array, Array]:
        """As `labels`, and squared distances float32 (n,)."""
        xp = self._xp
        labels = xp.empty(len(vectors), dtype=xp.int32)
        distances = xp.empty(len(vectors), dtype=xp.float32)
        for rows, part in self._pieces(vectors):
            label = labels[rows] = self._label(part)
            gap = part - self._wide[label]
            distances[rows] = xp.einsum("ij,ij->i", gap, gap)
        return labels, distances

    def _pieces(self, vectors: Array) -> Iterator[tuple[slice, Array]]:
        step = max(1, _MAX_DISTANCES // len(self._wide))
        for start in range(0, len(vectors), step):
            rows = slice(start, start + step)
            yield rows, vectors[rows].astype(self._xp.float64)

    def _label(self, part: Array) -> Array:
        gaps = self._lengths - 2 * (part @ self._wide.T)
        scale = self._xp.einsum("ij,ij->i", part, part) + self._longest
        return (gaps <= (gaps.min(axis=1) + 1e-12 * scale)[:, None]).argmax(axis=1)


def assign(xp: ModuleType, vectors: Array, centroids: Array) -> tuple[Array, Array]:
    """Labels and squared distances of `vectors`, see `Nearest`; for centroids that are asked once."""
    return Nearest(xp, centroids).assign(vectors)


def check_training(sample: Array, cells: int, init: Array | None) -> None:
    """Raise `BackendError` unless `cells` centroids can be trained on `sample`, from `init` if given."""
    n, dim = sample.shape
    if n == 0 or cells < 1:
        raise BackendError(f"cannot train {cells} cells on {n} vectors: give at least one of each")
    if init is not None and init.shape != (cells, dim):
        raise BackendError(f"the initial centroids have shape {init.shape}: this training needs ({cells}, {dim})")


def train_few(xp: ModuleType, sample: Array, cells: int, iterations: int, init: Array | None) -> Array:
    """Centroids, float32 (cells, dim), where there are no more vectors than cells.

    The libraries refuse such samples, and there is nothing to cluster: the vectors themselves are the centroids,
    repeated. With `init` the old centroids stay, and those that have vectors move to their mean.
    """
    if init is None:
        return xp.asarray(sample, dtype=xp.float32)[xp.arange(cells) % len(sample)]
    centroids = xp.array(init, dtype=xp.float32)
    for _ in range(iterations):
        labels, _distances = assign(xp, sample, centroids)
        for label in xp.unique(labels).tolist():
            centroids[label] = sample[labels == label].mean(axis=0)
    return centroids
