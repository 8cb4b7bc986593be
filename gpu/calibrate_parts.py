"""Whether queries are of several kinds, and what the kind finds that finds least.

Half of the rows may be noise and half near-copies of a few vectors: asked about as one group, they find 0.95 where the
copies find all and the noise 0.90. Two kinds of rows are told by the distance to their nearest ones, where the
logarithms of these distances lie around two values. Cutting them in two takes 0.55 to 0.79 of their variance for
sentences, words, Gaussians, clusters, and lengths that differ by orders of magnitude (96 rows, 49 draws of 50), and
0.81 to 1.00 for noise mixed with copies, with clusters, or with rows of 8 degrees of freedom.

Rows that drift are not of two kinds, so they are grouped by place, too. Such parts are small, and the least of four is
low by chance: a part counts only where chance would hardly have it find so little less than all, and then with what one
standard error may have taken from it, or 0.02.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import ranking
from headrace.gpu.backend import Array, Backend

__all__ = ["places", "two_kinds", "worst"]

_PLACES = 4
_EXPLAINED = 0.82
_LEAST = 0.1
_APART = math.log(1.25)
_NOTHING = 1e-3
_TELLING = 16
_BY_CHANCE = 2.5
_LET_PASS = 0.02


def two_kinds(distances: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.bool_] | None:
    """Which rows are of the kind that lies farther from its nearest rows; None where there is one kind.

    Parameters
    ----------
    distances : float (n,)
        Of each row from one of its nearest, 0 or more. Below a thousandth of the largest ones all count as equal.

    Returns
    -------
    far : bool (n,), or None
        A tenth of the rows at least are of either kind, and the one kind is 1.25 times as far away as the other.
    """
    count, least = len(distances), math.ceil(_LEAST * len(distances))
    nothing = _NOTHING * float(np.quantile(distances, 1 - _LEAST / 2)) if count else 0.0
    if count < 2 * least or nothing == 0 or not math.isfinite(nothing):
        return None
    logs = np.log(np.maximum(distances, nothing))
    rising = np.sort(logs)
    apart = rising - rising.mean()
    cuts = np.arange(least, count - least + 1)
    between = np.cumsum(apart)[cuts - 1] ** 2 * count / (cuts * (count - cuts))
    cut = int(cuts[between.argmax()])
    ratio = float(rising[cut:].mean() - rising[:cut].mean())
    if between.max() < _EXPLAINED * (apart**2).sum() or ratio < _APART or rising[cut] == rising[cut - 1]:
        return None
    far: npt.NDArray[np.bool_] = logs >= rising[cut]
    return far


def places(backend: Backend, points: Array, seed: int = 0) -> npt.NDArray[np.int32]:
    """Which of four places each point, float32 (n, dim), is at: int32 (n,)."""
    if len(points) <= _PLACES or not ranking.squares(backend.xp, points):
        return np.zeros(len(points), np.int32)
    labels = backend.kmeans.assign(points, backend.kmeans.train(points, _PLACES, seed=seed))[0]
    return labels.get() if hasattr(labels, "get") else np.asarray(labels)


def worst(hits: npt.NDArray[np.int64], of: int, labels: npt.NDArray[np.int32] | None) -> float:
    """The recall of the part that finds least, leniently, or that of all where no part tells itself from chance.

    Parameters
    ----------
    hits : int64 (q,)
        Of its `of` neighbours, how many each query found.
    of : int
    labels : int32 (q,), or None
        The part of each query; parts of fewer than 16 are too small to tell.
    """
    least = whole = int(hits.sum()) / (of * len(hits))
    for label in [] if labels is None else np.unique(labels):
        part = hits[labels == label] / of
        if len(part) >= _TELLING:
            mean, error = float(part.mean()), float(part.std()) / math.sqrt(len(part))
            if mean + _BY_CHANCE * error < whole:
                least = min(least, mean + max(error, _LET_PASS))
    return min(least, whole)
