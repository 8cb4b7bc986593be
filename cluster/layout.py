"""Where copies go when nothing is there yet: nearby cells together, each worker's copies scattered over all the others.

A query probes cells that lie near each other; if those lie on one worker, one worker is asked. And if the copies of one
worker's cells are spread over all others, its load and its repair are shared when it is lost. Both at once: cells are
brought into an order in which neighbours lie near, that order is cut into one run a worker, and each run is cut again
into one shorter run for each of the other workers, which hold its copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["fresh_layout", "near_order"]


def near_order(centroids: npt.NDArray[np.float32]) -> list[int]:
    """An order of the centroids, float32 (cells, dim), in which those that follow each other lie near each other.

    Halves along the direction of greatest spread, again and again, as a principal axis tree does (Sproull, 1991); each
    half is turned so that its end nearest to the half before it comes first. Deterministic.
    """
    points = np.asarray(centroids, dtype=np.float64)

    def ordered(rows: npt.NDArray[np.int64]) -> list[int]:
        if len(rows) <= 2:
            return [int(row) for row in rows]
        gaps = points[rows] - points[rows].mean(axis=0)
        axis = np.linalg.svd(gaps, full_matrices=False)[2][0]
        axis = axis if axis[np.argmax(np.abs(axis))] > 0 else -axis  # the sign of a singular vector means nothing
        along = rows[np.lexsort((rows, np.round(gaps @ axis, 9)))]
        left, right = ordered(along[: len(along) // 2]), ordered(along[len(along) // 2 :])
        turns = [
            (float(np.linalg.norm(points[a[-1]] - points[b[0]])), at, a, b)
            for at, (a, b) in enumerate(
                ((left, right), (left[::-1], right), (left, right[::-1]), (left[::-1], right[::-1]))
            )
        ]
        _, _, a, b = min(turns, key=lambda turn: turn[:2])
        return [*a, *b]

    return ordered(np.arange(len(points)))


def fresh_layout(
    order: Sequence[int], workers: Sequence[str], replicas: int, weight: Mapping[int, int]
) -> dict[int, list[str]]:
    """Copies of every cell in `order`, on min(`replicas`, len(`workers`)) distinct workers each.

    Parameters
    ----------
    order : sequence of int
        Cells; neighbours lie near each other.
    workers : sequence of str
    replicas : int
    weight : mapping of int to int
        What is balanced: rows of each cell, at least 1.
    """
    placed: dict[int, list[str]] = {}
    if not workers:
        return {cell: [] for cell in order}
    for at, run in enumerate(_runs(order, len(workers), weight)):
        others = [*workers[at + 1 :], *workers[:at]]
        copies = min(replicas - 1, len(others))
        for turn, part in enumerate(_runs(run, max(1, len(others)), weight)):
            for cell in part:
                placed[cell] = [workers[at], *(others[(turn + step) % len(others)] for step in range(copies))]
    return placed


def _runs(order: Sequence[int], count: int, weight: Mapping[int, int]) -> list[list[int]]:
    """`order` cut into `count` runs of about equal weight; some may be empty."""
    ends = np.cumsum([weight[cell] for cell in order])
    total = float(ends[-1]) if len(ends) else 0.0
    runs: list[list[int]] = [[] for _ in range(count)]
    for cell, end in zip(order, ends.tolist(), strict=True):
        middle = end - weight[cell] / 2
        runs[min(count - 1, int(middle * count / total))].append(cell)
    return runs
