"""Filters that keep half of the rows down to one in a thousand: what is found, and how fast."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.progress import progress
from benchmarks.report import criterion
from benchmarks.store_recall import Ints, exact, recall
from benchmarks.store_runbook import by_cluster
from benchmarks.store_setup import Filled, K, Part, Setup
from benchmarks.store_timing import ROUND_SECONDS, alternate, rates, ratios
from benchmarks.vectors import Vectors
from headrace.gpu.filters import parse
from headrace.gpu.index_spec import IndexSpec

__all__ = ["run"]

SELECTIVITIES = (0.5, 0.1, 0.01, 0.001)
ROWS = 50_000
TOPICS = 64
RAW_EFFORT = 64
AIMS = {0.5: 0.95, 0.1: 0.95, 0.01: 0.95, 0.001: 0.99}


def run(setup: Setup) -> Part:
    """Recall and queries/s through ``where=``, beside the raw library's graph with a bitmap and no help.

    ``bucket < n`` has nothing to do with where a row lies; ``topic == n`` is one neighbourhood of the space, while the
    queries come from everywhere: the matching rows are not where the search begins.
    """
    data = setup.docstrings.first(ROWS)
    count = len(data.rows)
    rng = np.random.default_rng(setup.seed)
    bucket = rng.permutation(count) * 1000 // count
    topic = np.empty(count, dtype=np.int64)
    topic[by_cluster(data.rows, setup.seed)] = np.arange(count) * TOPICS // count
    filled = Filled(setup.empty(data.dim, IndexSpec("graph")))
    attributes = {"bucket": bucket.tolist(), "topic": [f"topic {number}" for number in topic.tolist()]}
    filled.fill(data.rows, attributes=attributes, title=f"store over {count:,} x {data.dim} with attributes")
    raw = setup.raw_graph(data)
    schema = {"bucket": "int", "topic": "str"}
    cases: list[tuple[str, str, npt.NDArray[np.bool_], float]] = [
        (f"{share:g}", f"bucket < {round(share * 1000)}", bucket < round(share * 1000), AIMS[share])
        for share in SELECTIVITIES
    ]
    cases.append((f"{1 / TOPICS:.3g}, one topic", "topic == 'topic 7'", topic == 7, 0.95))
    table: dict[str, Any] = {}
    part = Part({f"filters, {count:,} x {data.dim}": table})
    with progress("filters"):
        for name, text, allowed, aim in cases:
            where = parse(text, schema)
            kept = np.flatnonzero(allowed)
            truth = kept[exact(data.rows[kept], data.queries, K)]
            search = partial(filled.ids, data.queries, where=where)
            bare = partial(raw.search, data.queries, RAW_EFFORT, allowed)
            least_seconds = 0.0 if setup.quick else ROUND_SECONDS
            own, floor = alternate((search, bare), max(2, setup.rounds // 2), least_seconds=least_seconds)
            figure = _recall(data, allowed, truth, search())
            table[name] = {
                "rows": len(kept),
                "recall": figure,
                "queries/s": rates(own, len(data.queries)),
                f"raw graph, efSearch {RAW_EFFORT}: recall": _recall(data, allowed, truth, bare()),
                "store / raw": ratios(own, floor),
            }
            part.criteria.append(criterion(f"filters: recall at {name}", figure, "recall@10", f">= {aim}"))
    return part


def _recall(data: Vectors, allowed: npt.NDArray[np.bool_], truth: Ints, found: Ints) -> float:
    """A row that does not pass counts as not found, however near it is."""
    return recall(data.rows, data.queries, truth, np.where(allowed[found], found, -1))
