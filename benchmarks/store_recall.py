"""What is near, exactly; how much of it an answer found; and the least effort that finds enough. Pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import faiss as typed_faiss
import numpy as np
import numpy.typing as npt

__all__ = ["Tuned", "exact", "least", "least_share", "matrix", "recall"]

# The stubs that come with FAISS lack half of what is used here.
faiss: Any = typed_faiss

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

TIE = 1e-5
"""Scores closer than this are one score: the rounding of another order of summing must not cost recall."""


@dataclass(frozen=True)
class Tuned:
    """A setting, and the recall it was seen to give; `reached` says whether that is what was asked for."""

    setting: float
    recall: float
    reached: bool


def exact(rows: Floats, queries: Floats, k: int) -> Ints:
    """Positions of the `k` rows with the highest inner product for each query, best first, int64 (q, min(k, n)).

    All at once through FAISS, which uses all cores.
    """
    found: Ints = faiss.knn(queries, rows, min(k, len(rows)), metric=faiss.METRIC_INNER_PRODUCT)[1]
    return found


def recall(rows: Floats, queries: Floats, truth: Ints, found: Ints) -> float:
    """Mean share of the true neighbours that were found.

    What counts is the score, computed here from the rows themselves: of several rows equally near, any will do. A row
    found twice counts once.

    Parameters
    ----------
    rows : float32 (n, dim)
    queries : float32 (q, dim)
    truth : int64 (q, k)
        Best first, from `exact`.
    found : int64 (q, m)
        Positions in `rows`, -1 where there is none; no more than k of them count.
    """
    if truth.size == 0:
        return 1.0
    wanted = truth.shape[1]
    worst = np.einsum("qd,qd->q", rows[truth[:, -1]], queries)
    found = found[:, :wanted]
    # Repeats beside each other, and all but the first of them set to "none".
    ordered = np.sort(found, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    scores = np.einsum("qkd,qd->qk", rows[ordered], queries)
    good = (ordered >= 0) & (scores >= worst[:, None] - TIE)
    return float(good.sum() / (len(truth) * wanted))


def matrix(found: Sequence[Sequence[int]], k: int) -> Ints:
    """Ids of each query's hits as one matrix, int64 (q, k), filled up with -1; ids are whole numbers."""
    made = np.full((len(found), k), -1, dtype=np.int64)
    for at, ids in enumerate(found):
        made[at, : len(ids)] = ids[:k]
    return made


def least(measure: Callable[[int], float], wanted: float, low: int, high: int) -> Tuned:
    """The least whole number from `low` to `high` whose `measure` reaches `wanted`, by halving; it rises with it.

    Where none does, the highest, and `Tuned.reached` is False.
    """
    seen = {high: measure(high)}
    if seen[high] < wanted:
        return Tuned(high, seen[high], False)
    while low < high:
        middle = (low + high) // 2
        seen[middle] = measure(middle)
        low, high = (low, middle) if seen[middle] >= wanted else (middle + 1, high)
    return Tuned(high, seen[high], True)


def least_share(measure: Callable[[float], float], wanted: float, *, steps: int = 64) -> Tuned:
    """The same for a share in (0, 1], in `steps` steps that grow finer towards 1, where recall is dear."""
    shares = [1.0 - (1.0 - at / steps) ** 2 for at in range(1, steps + 1)]
    found = least(lambda at: measure(shares[at]), wanted, 0, steps - 1)
    return Tuned(shares[int(found.setting)], found.recall, found.reached)
