"""Scoring every row, with cuVS: exact search as all kinds of index need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cupy as cp
from cuvs.neighbors import brute_force, filters

from headrace.gpu import ranking
from headrace.gpu.rapids.handles import handle

__all__ = ["Prepared", "metric_name", "prepare", "search"]

Array = Any

_GATHER = 8
_BLOCK_BYTES = 1 << 28
# A device may make a product of float32 from three of shorter numbers, and loses three bits.
_DEVICE = 8
_MORE, _AT_LEAST = 2, 16


def metric_name(metric: str) -> str:
    """cuVS's name; vectors are normalised for "cosine", so that the inner product is enough."""
    return "sqeuclidean" if metric == "l2" else "inner_product"


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What can be known of float32 rows before a query comes.

    Attributes
    ----------
    index : cuvs.neighbors.brute_force.Index
        For l2 it holds the rows' lengths.
    longest : float
        For l2 the largest squared length, else 0.
    """

    index: Any
    longest: float


def prepare(rows: Array, metric: str) -> Prepared:
    """Prepare a search over float32 rows.

    It keeps a view of `rows`, not the array: hold that as long as this.
    """
    with handle() as resources:
        index = brute_force.build(rows, metric=metric_name(metric), resources=resources)
    return Prepared(index, ranking.longest(cp, rows) if metric == "l2" else 0.0)


def search(
    rows: Array, prepared: Prepared | None, allowed: Array | None, queries: Array, k: int, metric: str
) -> tuple[Array, Array]:
    """As `headrace.gpu.backend.Exact.search`, with `prepared` from `prepare` of the same rows, or None.

    cuVS finds the smallest squared distances as |q|^2 + |x|^2 - 2 q x, which far from the origin is rounded by more
    than distances differ. So more rows than are wanted are taken from it and measured. Where even twice what rounding
    takes cannot bring a row that was not taken among the best, these are the best; else every row is measured.
    """
    count = len(rows) if allowed is None else int(cp.count_nonzero(allowed))
    # What cuVS returns where fewer rows are allowed than asked for is not written down, so it is never asked for more.
    found = min(k, count)
    if found == 0 or len(queries) == 0:
        return ranking.nothing_found(cp, len(queries), k, metric)
    queries = cp.ascontiguousarray(queries, dtype=cp.float32)
    if count * _GATHER < len(rows):
        chosen = cp.flatnonzero(allowed)
        scores, near = search(rows[chosen], None, None, queries, k, metric)
        return scores, cp.where(near < 0, near, chosen[near])
    # cuVS takes float16 rows too, but only with float16 queries, and rounding those changes which rows are the best.
    block = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    if rows.dtype != cp.float32 and len(rows) > block:
        return _in_blocks(rows, block, allowed, queries, k, metric)
    rows = cp.ascontiguousarray(rows, dtype=cp.float32)
    if prepared is None:
        prepared = prepare(rows, metric)
    taken = min(count, max(_MORE * found, found + _AT_LEAST)) if metric == "l2" else found
    bits = filters.from_bitset(ranking.bitset(cp, allowed)) if count < len(rows) else None
    with handle() as resources:
        _, near = brute_force.search(prepared.index, queries, taken, prefilter=bits, resources=resources)
    scores, best = ranking.rank(cp, rows, allowed, queries, cp.asarray(near), max(taken, k), metric)
    if taken < count and metric == "l2":
        slack = _DEVICE * ranking.rounding(rows.shape[1])
        lost = 2 * slack * (cp.einsum("qd,qd->q", queries, queries) + prepared.longest)
        reach = scores[:, found - 1] * (1 + slack) + 2 * lost
        unsure = cp.flatnonzero(~(cp.isfinite(reach) & (scores[:, taken - 1] >= reach)))
        if len(unsure):
            width = scores.shape[1]
            scores[unsure], best[unsure] = ranking.measure(cp, rows, allowed, queries[unsure], width)
    return scores[:, :k], best[:, :k]


def _in_blocks(
    rows: Array, block: int, allowed: Array | None, queries: Array, k: int, metric: str
) -> tuple[Array, Array]:
    """Block after block as float32, so that never all rows are held in both sizes."""
    scores, best = ranking.nothing_found(cp, len(queries), k, metric)
    for start in range(0, len(rows), block):
        part = rows[start : start + block].astype(cp.float32)
        among = None if allowed is None else allowed[start : start + block]
        values, near = search(part, None, among, queries, k, metric)
        values = cp.concatenate([scores, values], axis=1)
        near = cp.concatenate([best, cp.where(near < 0, near, near + start)], axis=1)
        order = cp.argsort(values if metric == "l2" else -values, axis=1, kind="stable")[:, :k]
        scores, best = cp.take_along_axis(values, order, axis=1), cp.take_along_axis(near, order, axis=1)
    return scores, best
