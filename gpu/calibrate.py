"""How much effort a recall takes, measured on the index itself when it is built.

Several groups of queries are asked (`calibrate_groups.py` says which and why), and the recall of the one that finds
least counts: so do new rows of a kind that is a tenth of the rows or more. Recall@10 of such, the worst of three or
four seeds, at the effort that was promised to give 0.95 (16 K rows, 24 to 128 numbers, every metric), where all rows
were taken for one kind, and now:

| rows, and whose recall | graph | | ivf_pq | |
|---|---|---|---|---|
| half noise, half copies of 50 vectors: noise | 0.80 | 1.00 | 0.78 | 0.94 |
| half noise, half near-copies: noise | 0.75 | 0.94 | 0.83 | 0.94 |
| a fifth noise, near-copies: noise | 0.66 | 1.00 | 1.00 | 1.00 |
| half noise, half of 8 degrees of freedom: noise | 0.74 | 0.93 | 0.75 | 0.93 |
| half noise, half clusters elsewhere: noise | 0.97 | 0.96 | 0.89 | 0.94 |
| the mean drifts, inner product: the earliest third | 0.89 | 0.89 | 0.93 | 0.94 |

What rows of one kind take is as before: sentences 24 (graph) and 50 (lists of codes), words 70 and 45, Gaussians 155
(16 K x 128, l2: 140) and 190, each 10 % more or less by the seed.

Where the recall stays below 0.95, chance is the reason, by which 200 queries are 0.01 to 0.02 wrong, but for two cases.
Graphs over drifting rows, l2, promise 0.95 and get 0.94: points between two rows are nearer to others than new rows
are. With inner products no effort finds more than 0.87 of what the earliest quarter of them asks for; that is seen, and
the search is exact, with three seeds of four. Rows whose lengths differ by orders of magnitude (inner product, float16)
get 0.94 to 0.96 from graphs.

High efforts take most of the time, so none is tried beyond what will be asked for, nor far below; each is twice the one
before. A group that found enough with less effort is not asked again.

What nobody can know beforehand is the recall of queries that are unlike all rows. Once such have come they are known:
the latest ones that the store was asked are a group too. In the streaming protocol of big-ann-benchmarks, where most
queries' own clusters are not there yet, recall was 0.938 without them and is 0.950 (sliding window: 0.949 and 0.961).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.gpu.backend import Array, Backend, IndexKind
from headrace.gpu.calibrate_groups import FEWEST, Group, between, rows, spreads
from headrace.gpu.errors import BackendError

__all__ = ["EXACT", "Calibration", "calibrate"]

EXACT = (1 << 31) - 1
"""The effort that means an exact search, whatever the kind: none has as many rows."""

_ENOUGH = 0.99
_ALL = 0.9995
_STEP = 2
_NEAR = 0.05
_CHEAP = 2
_FEW = 16
_KNOWN = 32
# Vectors that were drawn with the same seed are not what queries are drawn from.
_STREAM = 1_618_033


@dataclass(frozen=True, slots=True)
class Calibration:
    """Recall by effort of one index.

    Attributes
    ----------
    pairs : tuple of (int, float)
        Effort and recall, both rising; never empty.
    """

    pairs: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        efforts, recalls = zip(*self.pairs, strict=True) if self.pairs else ((), ())
        if not efforts or list(efforts) != sorted(set(efforts)) or list(recalls) != sorted(recalls):
            raise BackendError(
                f"calibration {self.pairs!r} is not of rising efforts and recalls: build the index again"
            )

    def effort(self, recall_target: float) -> int:
        """The effort that reaches the target, on a straight line between two that were tried; `EXACT` where none has.

        Recall rises ever more slowly with effort, so it lies above the line.
        """
        least, below = self.pairs[0]
        for effort, recall in self.pairs:
            if recall >= recall_target:
                share = 1.0 if effort == least else (recall_target - below) / (recall - below)
                return math.ceil(least + share * (effort - least))
            least, below = effort, recall
        return EXACT

    def recall(self, effort: int) -> float:
        """The recall that was measured at an effort, on a straight line between two that were tried; 1 at `EXACT`."""
        if effort >= EXACT:
            return 1.0
        efforts, recalls = zip(*self.pairs, strict=True)
        return float(np.interp(effort, efforts, recalls))

    @property
    def best(self) -> float:
        """The highest recall that any effort reached."""
        return self.pairs[-1][1]

    def to_wire(self) -> list[list[float]]:
        """The pairs as plain types, for msgpack or JSON."""
        return [[effort, recall] for effort, recall in self.pairs]

    @classmethod
    def from_wire(cls, pairs: Sequence[Sequence[float]]) -> Calibration:
        """The reverse of `to_wire`; raises `BackendError` where that cannot have made it."""
        try:
            return cls(tuple((int(effort), float(recall)) for effort, recall in pairs))
        except (TypeError, ValueError) as error:
            raise BackendError(f"calibration {pairs!r} is not of pairs of numbers: build the index again") from error


def calibrate(
    backend: Backend,
    kind: IndexKind,
    index: Any,
    vectors: Array,
    metric: str,
    *,
    recall_target: float = 0.95,
    k: int = 10,
    queries: int = 192,
    seed: int = 0,
    asked: Array | None = None,
) -> Calibration:
    """Search a new index with rising effort until it finds `recall_target`, and 0.99, and note the recall.

    Takes an exact search of 220 to 600 queries and some approximate ones: 0.15 s of one core for 16 K sentences of 384
    numbers, whose graph takes 3.1 s, and 0.1 s for their lists of codes, which take 0.5 s; twice that for graphs with
    inner products; hardly more for more rows. Where every search is exact, nothing is searched.

    Parameters
    ----------
    backend : Backend
    kind : IndexKind
        Of `backend.kinds`.
    index : Any
        From `kind.build`.
    vectors : float32 or float16, (n, dim)
        The indexed vectors, in the dtype that the index keeps.
    metric : one of `headrace.gpu.backend.METRICS`
    recall_target : float
        What searches will mostly ask for. Efforts that find far less, or more than this and 0.99, are not tried: for
        these `Calibration.effort` gives the least that was, and `EXACT`.
    k : int
        Recall is measured among so many rows.
    queries : int
        Of each group, at most; there are no more than rows.
    seed : int
        The same arguments give the same calibration.
    asked : float32 (q, dim), optional
        Queries that searches came with (`headrace.gpu.asked`). From 32 on their recall counts like the groups'.
    """
    efforts = kind.efforts(index, k)
    if efforts == (0,):
        return Calibration(((0, 1.0),))
    random = np.random.default_rng((_STREAM, seed))
    count, k = min(queries, len(vectors)), min(k, len(vectors))
    graph = kind is backend.kinds["graph"]
    asking = [between(backend, vectors, metric, count, random)]
    if graph:
        asking += spreads(backend, vectors, metric, count, random)
    if asked is not None and len(asked) >= _KNOWN:
        asking.append(backend.xp.asarray(random.permutation(asked)))
    judges = [Group(backend, vectors, metric, k, points) for points in asking]
    if not graph or metric == "ip":
        judges += rows(backend, vectors, metric, k, count, random)
    enough = _goal(recall_target)

    def found(effort: int, most: int) -> float:
        # Where little effort finds little, many queries are needed to see how much; elsewhere each takes more time.
        many = min(most, max(FEWEST, queries * _CHEAP * efforts[0] // effort))
        return min(group.found(kind, index, many, effort, enough) for group in judges)

    tried = _climb(efforts, recall_target, lambda effort: found(effort, count), lambda effort: found(effort, _FEW))
    rising = np.maximum.accumulate([tried[effort] for effort in sorted(tried)])
    return Calibration(tuple(zip(sorted(tried), rising.tolist(), strict=True)))


def _climb(
    efforts: Sequence[int], recall_target: float, found: Callable[[int], float], roughly: Callable[[int], float]
) -> dict[int, float]:
    """Recall by effort, for efforts from below the target to where it is reached, and 0.99 too; not in order.

    Efforts are doubled. The first is the one that a few queries say is near the target: were it beyond, smaller ones
    are tried too.
    """
    steps = [efforts[0]]
    for effort in efforts:
        if effort >= _STEP * steps[-1]:
            steps.append(effort)
    if steps[-1] != efforts[-1]:
        steps.append(efforts[-1])
    goal = _goal(recall_target)
    first = 0
    while first < len(steps) - 1 and roughly(steps[first]) < recall_target - _NEAR:
        first += 1
    tried = {steps[first]: found(steps[first])}
    for effort in reversed(steps[:first]):
        if min(tried.values()) < recall_target:
            break
        tried[effort] = found(effort)
    for effort in steps[first + 1 :]:
        if max(tried.values()) >= goal:
            break
        tried[effort] = found(effort)
    return tried


def _goal(recall_target: float) -> float:
    return min(max(recall_target, _ENOUGH), _ALL)
