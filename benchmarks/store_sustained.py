"""Ingest with sealing and merging beside it: how fast, how well found, and how often a row is written."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from benchmarks.progress import progress
from benchmarks.report import criterion
from benchmarks.store_recall import Ints, exact, recall
from benchmarks.store_setup import BATCH, Filled, K, Part, Setup
from benchmarks.store_timing import middle
from benchmarks.store_upkeep import Maintainer, counting
from headrace.gpu.index_spec import KINDS, IndexSpec, build_params

__all__ = ["run"]

ROWS = 32_768
SEALS = 16
"""Segments that are sealed on the way: enough for merges of merges."""
SAMPLES = 24
QUERIES = 50
AGAIN = 0.05
"""Share of each batch that writes an id once more: rows die, and one that were found twice or lost would show."""
AIM = 0.95


def run(setup: Setup) -> Part:
    """For each kind of index: vectors/s, recall at 10 sampled all along, and how often a row is written.

    The rate counts until the last row has been sealed and merged. The raw figure is one build of the same index over
    the same rows by the same library, with nothing to be searched meanwhile.
    """
    table: dict[str, Any] = {}
    part = Part()
    rows = min(setup.rows, ROWS)
    for kind in KINDS:
        found, recalls = _ingest(setup, kind, rows)
        table[kind] = found
        # The least of all samples: "throughout" is not "on average".
        part.criteria.append(criterion(f"sustained: {kind}, recall, least", min(recalls), "recall@10", f">= {AIM}"))
    part.results[f"sustained ingest, {rows:,} x {setup.docstrings.dim}"] = table
    return part


def _ingest(setup: Setup, kind: str, rows: int) -> tuple[dict[str, Any], list[float]]:
    data = setup.docstrings.first(rows)
    backend, counted = counting(setup.backend)
    store = setup.empty(data.dim, IndexSpec(kind), seal_rows=max(256, rows // SEALS), backend=backend)
    filled = Filled(store)
    rng = np.random.default_rng(setup.seed)
    seen: list[tuple[int, Ints, float]] = []
    queries = data.queries[:QUERIES]
    every = max(1, rows // BATCH // SAMPLES)
    written = 0

    def look(upto: int) -> None:
        began = time.perf_counter()
        seen.append((upto, filled.ids(queries), time.perf_counter() - began))

    with progress(f"sustained ingest, {kind}") as report:
        began = time.perf_counter()
        with Maintainer(store) as maintainer:
            for number, start in enumerate(range(0, rows, BATCH)):
                end = min(start + BATCH, rows)
                tags = np.arange(start, end)
                if start:
                    tags = np.unique(np.concatenate([tags, rng.integers(start, size=int(BATCH * AGAIN))]))
                store.apply(filled.upserts(tags, data.rows[tags]))
                written += len(tags)
                if number % 4 == 3:
                    maintainer.keep_up()
                if number % every == every - 1:
                    look(end)
                    report(end, rows)
            maintainer.wait()
        took = time.perf_counter() - began
        look(rows)
        report(rows, rows)
    with progress(f"raw build, {kind}"):
        began = time.perf_counter()
        params = build_params(IndexSpec(kind), rows, data.dim)
        setup.backend.kinds[kind].build(setup.backend.xp.asarray(data.rows), "cosine", params, threads=setup.threads)
        raw = time.perf_counter() - began
    recalls = [recall(data.rows, queries, exact(data.rows[:upto], queries, K), ids) for upto, ids, _ in seen]
    return {
        "vectors/s": written / took,
        "raw build, vectors/s": rows / raw,
        "of raw": written / took / (rows / raw),
        # Once into the growing segment, and once into each index that it comes into.
        "written, times": 1.0 + counted.rows / written,
        "builds": counted.builds,
        "building, share": counted.seconds / took,
        "recall, least": min(recalls),
        "recall, mean": sum(recalls) / len(recalls),
        "search of 50, ms": middle([one[2] for one in seen]) * 1e3,
    }, recalls
