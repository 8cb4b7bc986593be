"""A settled store against the raw library's graph: the same vectors, parameters and threads, at the same recall."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.progress import progress
from benchmarks.report import criterion
from benchmarks.store_recall import Floats, Ints, exact, least, least_share, recall
from benchmarks.store_setup import Filled, K, Part, Setup
from benchmarks.store_timing import ROUND_SECONDS, alternate, rates, ratios
from benchmarks.vectors import Vectors
from headrace.gpu.index_spec import IndexSpec

__all__ = ["run"]

GOALS = (0.95, 0.99)
BATCHED = 64
AIM = 0.8
MOST_EFFORT = 2048


def run(setup: Setup, *, data: str = "docstrings") -> Part:
    """Queries per second, batched and one by one.

    Each side is tuned by itself to the least effort that reaches the recall, on the queries that are then timed: the
    raw library's efSearch, the store's `recall_target`. The store's efforts come in steps, so it may find a little more
    than it was asked for; the raw library tuned to that is timed as well. Rounds alternate; the ratio is taken round by
    round.
    """
    vectors: Vectors = getattr(setup, data)
    raw = setup.raw_graph(vectors)
    filled = Filled(setup.empty(vectors.dim, IndexSpec("graph")))
    filled.fill(vectors.rows, title=f"store over {len(vectors.rows):,} x {vectors.dim}, to be settled")
    truth = exact(vectors.rows, vectors.queries, K)

    def reached(search: Callable[[Floats], Ints]) -> float:
        return recall(vectors.rows, vectors.queries, truth, search(vectors.queries))

    title = f"search, {vectors.name}, {len(vectors.rows):,} x {vectors.dim}"
    segments = filled.store.statistics()["segments"]
    about: dict[str, Any] = {
        "raw": raw.name,
        "segments": ", ".join(f"{one['kind']} {one['rows']:,}" for one in segments),
        "raw build, vectors/s": len(vectors.rows) / raw.seconds,
        "M, efConstruction": f"{raw.params.graph_degree}, {raw.params.graph_effort}",
    }
    table: dict[str, Any] = {}
    part = Part({title: table, f"{title}: about": about})
    for goal in GOALS:
        with progress(f"tuning both to recall {goal}"):
            ours = least_share(lambda share: reached(partial(filled.ids, recall_target=share)), goal)
            theirs, same = (
                least(lambda effort: reached(partial(raw.search, effort=effort)), wanted, K, MOST_EFFORT)
                for wanted in (goal, max(goal, ours.recall))
            )
        about[f"recall {goal}: raw efSearch, recall"] = f"{theirs.setting:g}, {theirs.recall:.4f}"
        about[f"recall {goal}: store's recall_target, recall"] = f"{ours.setting:.4f}, {ours.recall:.4f}"
        for name, size in (("batched", BATCHED), ("one by one", 1)):
            groups = [vectors.queries[at : at + size] for at in range(0, len(vectors.queries), size)]
            with progress(f"recall {goal}, {name}"):
                searches: list[Callable[[Floats], object]] = [
                    partial(filled.store.search, k=K, recall_target=ours.setting),
                    partial(raw.search, effort=int(theirs.setting)),
                    partial(raw.search, effort=int(same.setting)),
                ]
                own, floor, equal = alternate(
                    [partial(_ask, search, groups) for search in searches],
                    setup.rounds,
                    least_seconds=0.0 if setup.quick else ROUND_SECONDS,
                )
            ratio = ratios(own, floor)
            table[f"recall {goal}, {name}"] = {
                "store, queries/s": rates(own, len(vectors.queries)),
                "raw, queries/s": rates(floor, len(vectors.queries)),
                "store / raw": ratio,
                "store / raw at the store's recall": ratios(own, equal),
            }
            # What never reached the recall on either side was not compared at that recall.
            figure = ratio["median"] if theirs.reached and ours.reached else None
            part.criteria.append(
                criterion(f"search {data}: recall {goal}, {name}", figure, "of raw queries/s", f">= {AIM}")
            )
    return part


def _ask(search: Callable[[Floats], object], groups: list[Floats]) -> None:
    for queries in groups:
        search(queries)
