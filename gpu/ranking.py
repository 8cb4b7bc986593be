"""What the libraries of a device return, made exact and put in order: one piece of code over NumPy and CuPy."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

__all__ = ["bitset", "longest", "measure", "nothing_found", "rank", "rounding", "squares"]

Array = Any

_LONGEST = 1e18
_MOST_NUMBERS = 1 << 26
"""Of candidates gathered at once: 256 MB of float32."""


def bitset(xp: ModuleType, allowed: Array) -> Array:
    """Bool (n,) as bits, uint32 (ceil(n / 32),): row r is bit r % 32 of word r // 32."""
    octets = xp.packbits(allowed, bitorder="little")
    padded = xp.zeros(-(-len(octets) // 4) * 4, dtype=xp.uint8)
    padded[: len(octets)] = octets
    return padded.view(xp.uint32)


def rounding(dim: int) -> float:
    """How far off 2 q x - |x|^2 is at most when counted in float32: by this much of |q|^2 + 2 |x|^2.

    A sum of n products in any order, with or without fused steps, is off by at most n u / (1 - n u) of the sum of their
    sizes, u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), and 2 |q x| is at most
    |q|^2 + |x|^2; eight more steps are for what else is counted on the way.
    """
    off = (dim + 8) * 2.0**-24
    return off / (1 - off)


def squares(xp: ModuleType, vectors: Array) -> bool:
    """Whether all vectors, float32 or float16 (n, dim), are so short that no square of a distance is infinite.

    They are below 1e18 long: the largest float32 is the square of 1.8e19, and libraries double and add up.
    """
    if vectors.dtype == xp.float16:
        return bool(xp.isfinite(vectors).all())
    largest = max(abs(float(vectors.max())), abs(float(vectors.min())))
    return largest * math.sqrt(vectors.shape[1]) < _LONGEST


def longest(xp: ModuleType, vectors: Array) -> float:
    """The largest squared length of the vectors, float32 (n, dim), n >= 1."""
    step = max(1, _MOST_NUMBERS // vectors.shape[1])
    parts = (vectors[start : start + step] for start in range(0, len(vectors), step))
    return max(float(xp.einsum("ij,ij->i", part, part).max()) for part in parts)


def measure(xp: ModuleType, vectors: Array, allowed: Array | None, queries: Array, k: int) -> tuple[Array, Array]:
    """The `k` allowed rows with the smallest squared distances, from the differences to every row.

    Nothing cancels here, as it does in 2 q x - |x|^2. Takes a query at a time, because it is seldom needed.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    vectors : float32 (n, dim)
    allowed : bool (n,), or None for all
    queries : float32 (q, dim)
    k : int

    Returns
    -------
    scores : float32 (q, k)
    rows : int64 (q, k)
        As in `headrace.gpu.backend.Exact.search`; a row that is infinitely far away is not found.
    """
    scores, rows = nothing_found(xp, len(queries), k, "l2")
    step = max(1, _MOST_NUMBERS // vectors.shape[1])
    for number in range(len(queries)):
        parts = []
        for start in range(0, len(vectors), step):
            gaps = vectors[start : start + step] - queries[number]
            parts.append(xp.einsum("ij,ij->i", gaps, gaps))
        distances = xp.concatenate(parts)
        if allowed is not None:
            distances = xp.where(allowed, distances, xp.float32(xp.inf))
        found = min(k, len(vectors))
        best = xp.argpartition(distances, found - 1)[:found]
        best = best[xp.argsort(distances[best])]
        scores[number, :found] = distances[best]
        rows[number, :found] = xp.where(xp.isfinite(distances[best]), best, -1)
    return xp.where(rows < 0, xp.float32(xp.inf), scores), rows


def nothing_found(xp: ModuleType, queries: int, k: int, metric: str) -> tuple[Array, Array]:
    """The answer of `headrace.gpu.backend.Exact.search` where no row is allowed."""
    worst = xp.inf if metric == "l2" else -xp.inf
    return xp.full((queries, k), worst, dtype=xp.float32), xp.full((queries, k), -1, dtype=xp.int64)


def rank(
    xp: ModuleType, vectors: Array, allowed: Array | None, queries: Array, rows: Array, k: int, metric: str
) -> tuple[Array, Array]:
    """Score candidate rows exactly and put the best first.

    Libraries differ in the sign of an inner product, in how exact a distance is, and in what they put where they have
    found nothing; the rows are all that is taken from them.

    Parameters
    ----------
    xp : module
        numpy or cupy.
    vectors : float32 or float16, (n, dim)
    allowed : bool (n,), or None for all
    queries : float32 (q, dim)
    rows : any integers, (q, r)
        Candidates, none twice; what is no allowed row is ignored.
    k : int
    metric : one of `headrace.gpu.backend.METRICS`

    Returns
    -------
    scores : float32 (q, k)
    rows : int64 (q, k)
        As in `headrace.gpu.backend.Exact.search`.
    """
    step = max(1, _MOST_NUMBERS // max(1, rows.shape[1] * vectors.shape[1]))
    if len(queries) > step:
        parts = [
            rank(xp, vectors, allowed, queries[start : start + step], rows[start : start + step], k, metric)
            for start in range(0, len(queries), step)
        ]
        return xp.concatenate([scores for scores, _ in parts]), xp.concatenate([best for _, best in parts])
    rows = rows.astype(xp.int64)
    usable = (rows >= 0) & (rows < len(vectors))
    rows = xp.where(usable, rows, 0)
    if allowed is not None:
        usable &= allowed[rows]
    candidates = vectors[rows].astype(xp.float32, copy=False)
    if metric == "l2":
        gaps = candidates - queries[:, None, :]
        values = -xp.einsum("qrd,qrd->qr", gaps, gaps)
    else:
        values = xp.einsum("qrd,qd->qr", candidates, queries)
    values = xp.where(usable, values, -xp.inf).astype(xp.float32)
    order = xp.argsort(-values, axis=1, kind="stable")[:, :k]
    scores, best = nothing_found(xp, len(queries), k, metric)
    found = order.shape[1]
    scores[:, :found] = xp.take_along_axis(-values if metric == "l2" else values, order, axis=1)
    best[:, :found] = xp.take_along_axis(xp.where(usable, rows, -1), order, axis=1)
    return scores, best
