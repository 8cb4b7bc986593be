"""Is what the index holds what was written? Pure functions over plain rows, for the demo and for whoever doubts.

Nothing here asks the index whether it is right: what must be there is known from Kafka's own acknowledgements, and the
exact answers of a search are computed from the vectors themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Difference", "Expected", "Seen", "compare", "exact_scores", "percentiles", "recall"]

TIE = 1e-5
"""Scores nearer than this are equal: the order of float32 sums moves them by as much, and equal texts are common."""


@dataclass(frozen=True)
class Expected:
    """The last version of an id that Kafka acknowledged."""

    topic_partition: int
    offset: int
    text: str


@dataclass(frozen=True)
class Seen:
    """One row that a worker holds, or that a read returned."""

    id: str
    topic_partition: int
    offset: int
    text: str


@dataclass
class Difference:
    """Ids that are not as they must be, each with where it was seen so; all empty where everything is right.

    Attributes
    ----------
    missing : list of (id, what)
        On fewer copies than must hold it, or not returned.
    ghosts : list of (id, what)
        Deleted or never written and there all the same, or twice on one copy.
    stale : list of (id, what)
        Another version or another text than the last one written.
    """

    missing: list[tuple[str, str]] = field(default_factory=list)
    ghosts: list[tuple[str, str]] = field(default_factory=list)
    stale: list[tuple[str, str]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing or self.ghosts or self.stale)


def compare(
    expected: Mapping[str, Expected],
    copies: Mapping[str, Iterable[Seen]],
    answers: Iterable[tuple[str, Seen | None]],
    needed: int,
) -> Difference:
    """Hold everything that is there against everything that must be there.

    Parameters
    ----------
    expected : Mapping of id to Expected
        What must be there, and nothing else.
    copies : Mapping of address to iterable of Seen
        Every row that each worker holds.
    answers : iterable of (id, Seen or None)
        What a read by id returned, for every expected id and for every deleted one.
    needed : int
        Workers on which each id must be, at its last version.

    Returns
    -------
    Difference
    """
    found = Difference()
    holders: Counter[str] = Counter()
    for address, rows in copies.items():
        here: set[str] = set()
        for row in rows:
            wanted = expected.get(row.id)
            if wanted is None or row.id in here:
                found.ghosts.append((row.id, address))
            elif _differs(row, wanted):
                found.stale.append((row.id, address))
            # A stale row is there, if wrongly: it is counted once, as stale and not as missing too.
            here.add(row.id)
        holders.update(here)
    found.missing += [(id_, f"on {holders[id_]} of {needed} copies") for id_ in expected if holders[id_] < needed]
    asked: set[str] = set()
    for id_, answer in answers:
        asked.add(id_)
        wanted = expected.get(id_)
        if wanted is None:
            if answer is not None:
                found.ghosts.append((id_, "get"))
        elif answer is None:
            found.missing.append((id_, "get"))
        elif answer.id != id_ or _differs(answer, wanted):
            found.stale.append((id_, "get"))
    found.missing += [(id_, "never asked for") for id_ in expected if id_ not in asked]
    return found


def _differs(row: Seen, wanted: Expected) -> bool:
    return (row.topic_partition, row.offset, row.text) != (wanted.topic_partition, wanted.offset, wanted.text)


def exact_scores(
    vectors: npt.NDArray[np.float32], queries: npt.NDArray[np.float32], rows: int = 64
) -> Iterable[npt.NDArray[np.float32]]:
    """The score of every vector for each query, query by query: inner products of vectors of length 1.

    Parameters
    ----------
    vectors : array of float32 (n, dim)
    queries : array of float32 (q, dim)
    rows : int
        Queries multiplied at once; bounds the memory to ``rows * n`` floats.

    Yields
    ------
    array of float32 (n,)
    """
    for start in range(0, len(queries), rows):
        yield from queries[start : start + rows] @ vectors.T


def recall(
    ids: Sequence[str], scores: Iterable[npt.NDArray[np.float32]], answers: Iterable[Sequence[str]], k: int = 10
) -> float:
    """The share of the exact `k` best that was found, ties counted by score.

    Parameters
    ----------
    ids : sequence of str (n,)
        The live set.
    scores : iterable of array of float32 (n,)
        The exact score of each of `ids`, for each query.
    answers : iterable of sequence of str
        The ids that a search returned for each query, at least `k` where so many exist.
    k : int

    Returns
    -------
    float
        Between 0 and 1. An id counts if its own exact score is not below the exact k-th best (less `TIE`), whatever
        score the search gave it; an id that is not in the live set, or is there twice, counts nothing.
    """
    places = {id_: place for place, id_ in enumerate(ids)}
    found = wanted = 0
    for exact, answer in zip(scores, answers, strict=True):
        best = min(k, len(exact))
        threshold = np.partition(exact, len(exact) - best)[len(exact) - best] - TIE
        hits = [places[id_] for id_ in dict.fromkeys(answer[:k]) if id_ in places]
        found += int(np.count_nonzero(exact[hits] >= threshold))
        wanted += best
    return found / wanted if wanted else 0.0


def percentiles(values: Sequence[float], wanted: Sequence[int] = (50, 99)) -> dict[str, float]:
    """``{"p50": ..., "p99": ...}`` of `values`, each a value that occurred; empty where there are none."""
    if not values:
        return {}
    points = np.percentile(values, list(wanted), method="higher")
    return {f"p{point}": round(float(value), 2) for point, value in zip(wanted, points, strict=True)}
