"""The streaming protocol of big-ann-benchmarks: insert, delete, replace and search as a runbook says."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faiss as typed_faiss
import numpy as np
import numpy.typing as npt

from benchmarks.progress import progress
from benchmarks.report import criterion
from benchmarks.runbook import FOLDER, Live, Runbook, Step, read, scaled
from benchmarks.store_recall import Floats, exact, recall
from benchmarks.store_setup import BATCH, Filled, K, Part, Setup
from benchmarks.store_upkeep import counting
from headrace.gpu.index_spec import IndexSpec

__all__ = ["run"]

# The stubs that come with FAISS lack half of what is used here.
faiss: Any = typed_faiss

ROWS = 50_000
QUERIES = 200
SEALS = 25
"""Segments sealed if a runbook brought each row once. Smaller ones than a store's own: most rows must be in an index
for a search step to say something about it."""
CLUSTERS = 64
AIM = 0.95


def run(setup: Setup, *, files: Sequence[Path] = ()) -> Part:
    """Recall at 10, averaged over the search steps of each runbook.

    What waits is sealed and merged before each search step, so that a step asks the indexes, not rows that still wait
    for one and are searched exactly; so the same seed gives the same recall however fast the machine is.
    """
    table: dict[str, Any] = {}
    part = Part({"runbooks": table})
    for file in files or sorted(FOLDER.glob("*.yaml")):
        runbook = scaled(read(file), min(len(setup.docstrings.rows), ROWS))
        table[file.stem] = found = _play(setup, file.stem, runbook)
        mean = found["recall, mean"]
        part.criteria.append(criterion(f"runbook: {file.stem}, mean recall", mean, "recall@10", f">= {AIM}"))
    return part


def _play(setup: Setup, name: str, runbook: Runbook) -> dict[str, Any]:
    rows = setup.docstrings.rows[: runbook.vectors]
    if runbook.dataset.endswith("-clustered"):
        rows = rows[by_cluster(rows, setup.seed)]
    queries = setup.docstrings.queries[:QUERIES]
    backend, counted = counting(setup.backend)
    seal_rows = max(128, len(rows) // SEALS)
    filled = Filled(setup.empty(rows.shape[1], IndexSpec("graph"), seal_rows=seal_rows, backend=backend))
    live = Live(runbook.vectors)
    recalls: list[float] = []
    searching = writing = maintaining = 0.0
    written = 0
    with progress(f"runbook {name}") as report:
        for number, step in enumerate(runbook.steps):
            report(number, len(runbook.steps))
            live.take(step)
            if step.operation != "search":
                writing += _write(filled, step, rows)
                written += len(step.tags)
                continue
            began = time.perf_counter()
            filled.settle()
            maintaining += time.perf_counter() - began
            began = time.perf_counter()
            found = filled.ids(queries)
            searching += time.perf_counter() - began
            recalls.append(_recall(live, rows, queries, found))
        report(len(runbook.steps), len(runbook.steps))
    return {
        "steps": len(runbook.steps),
        "points, most": runbook.max_points,
        "recall, mean": sum(recalls) / len(recalls),
        "recall, least": min(recalls),
        "queries/s": len(recalls) * len(queries) / searching,
        "applied/s": written / writing,
        "with indexes/s": written / (writing + maintaining),
        "written, times": 1.0 + counted.rows / written,
    }


def by_cluster(rows: Floats, seed: int) -> npt.NDArray[np.int64]:
    """The rows in an order in which those of one k-means cluster follow each other."""
    kmeans = faiss.Kmeans(rows.shape[1], min(CLUSTERS, max(1, len(rows) // 40)), niter=8, seed=seed)
    kmeans.train(rows)
    return np.argsort(kmeans.index.search(rows, 1)[1][:, 0], kind="stable")


def _write(filled: Filled, step: Step, rows: Floats) -> float:
    """Seconds to apply an insert, a replace or a delete."""
    batches = []
    for start in range(0, len(step.tags), BATCH):
        tags = step.tags[start : start + BATCH]
        if step.operation == "delete":
            batches.append(filled.deletes(tags))
        else:
            vectors = step.vectors[start : start + BATCH]
            batches.append(filled.upserts(tags, rows[vectors.start : vectors.stop]))
    began = time.perf_counter()
    for batch in batches:
        filled.store.apply(batch)
    return time.perf_counter() - began


def _recall(live: Live, rows: Floats, queries: Floats, found: npt.NDArray[np.int64]) -> float:
    """Against exact search over what is there; a tag that is not there counts as not found."""
    tags = live.tags()
    there = rows[live.vectors()]
    at = np.searchsorted(tags, found)
    at[at == len(tags)] = 0
    positions = np.where(tags[at] == found, at, -1) if len(tags) else np.full_like(found, -1)
    return recall(there, queries, exact(there, queries, K), positions)
