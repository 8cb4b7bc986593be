"""How fast rows go into the growing segment, index building apart, against a bare copy of the same numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.progress import progress
from benchmarks.report import criterion, spread
from benchmarks.store_setup import BATCH, Filled, Part, Setup
from benchmarks.store_timing import rates, ratios
from benchmarks.vectors import Vectors, clustered
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.rows import Batch

__all__ = ["run"]

DIM = 384
ROWS = 100_000
ROUNDS = 5
AIM = 100_000


def run(setup: Setup) -> Part:
    """Vectors per second; what the numbers are does not matter here, so nothing has to be encoded."""
    rows = min(setup.rows, ROWS)
    data = clustered(rows, DIM, seed=setup.seed, queries=0)
    names = (lambda tag: f"document-{tag}", int)
    brands = [("ash", "birch", "cedar")[at % 3] for at in range(rows)]
    attributes: dict[str, list[Any]] = {
        "price": [at * 0.5 for at in range(rows)],
        "stock": list(range(rows)),
        "brand": brands,
    }
    cases: dict[str, Callable[[], list[float]]] = {
        "string ids": lambda: _fill(setup, data, "string", names[0], None),
        "integer ids": lambda: _fill(setup, data, "integer", names[1], None),
        "string ids, 3 attributes": lambda: _fill(setup, data, "string", names[0], attributes),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*cases, "raw copy", "string ids, all known already")}
    # In turn, so that a machine that slows down does so for all of them.
    with progress("apply") as report:
        rounds = min(setup.rounds, ROUNDS)
        for at in range(rounds):
            report(at, rounds)
            seconds["raw copy"].append(_copy(data))
            for name, case in cases.items():
                first, *again = case()
                seconds[name].append(first)
                if name == "string ids":
                    seconds["string ids, all known already"] += again
    table: dict[str, Any] = {name: {"vectors/s": rates(found, rows)} for name, found in seconds.items()}
    for name, found in seconds.items():
        table[name]["of the raw copy"] = ratios(found, seconds["raw copy"])
        table[name]["us a vector"] = spread(one / rows * 1e6 for one in found)
    figure = table["string ids"]["vectors/s"]["median"]
    return Part(
        {f"apply, {rows:,} x {DIM} in batches of {BATCH}": table},
        [criterion("apply: into growing, 384-d, string ids", figure, "vectors/s", f">= {AIM}")],
    )


def _fill(
    setup: Setup,
    data: Vectors,
    ids: str,
    name: Callable[[int], int | str],
    attributes: dict[str, list[Any]] | None,
) -> list[float]:
    """Seconds for all rows as new ones, then for the same ids once more."""
    store = setup.empty(data.dim, IndexSpec(), ids=ids)
    filled = Filled(store, ids=name)
    first = list(filled.batches(data.rows, attributes=attributes))
    again = list(filled.batches(data.rows, attributes=attributes))
    return [_apply(store.apply, first), _apply(store.apply, again)]


def _apply(apply: Callable[[Batch], object], batches: Sequence[Batch]) -> float:
    began = time.perf_counter()
    for batch in batches:
        apply(batch)
    return time.perf_counter() - began


def _copy(data: Vectors) -> float:
    """The floor: the same batches copied behind each other into memory that is there already, and nothing kept."""
    target = np.zeros_like(data.rows)
    parts = [data.rows[start : start + BATCH] for start in range(0, len(data.rows), BATCH)]
    began = time.perf_counter()
    at = 0
    for part in parts:
        target[at : at + len(part)] = part
        at += len(part)
    return time.perf_counter() - began
