"""Concurrent single queries, gathered into batches while the worker is busy and not: how many are answered, how soon.

Callers on one event loop each ask one query after the other, as a worker's handlers do. Both ways are measured in turns
over the same store, and told as ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import vectors
from benchmarks.store_setup import METRIC, Filled
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.gather import Gatherer, GatherSettings
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.store import Store

__all__ = ["measure", "run"]

K = 10
CALLERS = (1, 8, 64)


def run(
    *,
    backend: Backend | None = None,
    rows: int = 50_000,
    dim: int = 384,
    seed: int = 0,
    callers: Sequence[int] = CALLERS,
    seconds: float = 1.0,
    rounds: int = 5,
    kind: str = "graph",
    settings: GatherSettings | None = None,
) -> dict[str, Any]:
    """Measure both ways.

    Parameters
    ----------
    backend : Backend, optional
        The host's if left out.
    rows, dim, seed
        Of made-up clustered vectors.
    callers : sequence of int
        How many ask at the same time.
    seconds : float
        Of one round, of one way.
    rounds : int
        Of each way, in turns.
    kind : str
        Of the index.
    settings : GatherSettings, optional
        Its defaults if left out.

    Returns
    -------
    dict
        Setting; and for each number of callers the queries/s of both ways, the mean batch, and ratios of gathered to
        alone, each the median over pairs of rounds: of the queries/s, and of the median and the 99th percentile of the
        time that a query took.
    """
    backend = backend or resolve("host")
    made = vectors.clustered(rows, dim, seed=seed, queries=1000, clusters=64)
    filled = Filled(Store(backend, dim, METRIC, index=IndexSpec(kind), ids="integer"))
    filled.fill(made.rows, title=f"store over {rows:,} x {dim}")
    chosen = settings or GatherSettings()
    found: dict[str, Any] = {
        "rows": rows, "dim": dim, "index": kind, "at_once": chosen.at_once, "batch": chosen.most,
        "window_ms": chosen.window * 1e3,
    }  # fmt: skip
    for count in callers:
        found[f"{count} callers"] = _compared(filled.store, made.queries, count, chosen, seconds, rounds)
    return found


def _compared(
    store: Store, queries: np.ndarray, callers: int, settings: GatherSettings, seconds: float, rounds: int
) -> dict[str, float]:
    measure(store, queries, callers, settings, seconds / 4)
    ways: dict[str, list[Mapping[str, float]]] = {"gathered": [], "alone": []}
    alone = GatherSettings(at_once=settings.at_once, most=1)
    for number in range(rounds):
        order = list(ways) if number % 2 else list(reversed(ways))
        for way in order:
            asked = settings if way == "gathered" else alone
            ways[way].append(measure(store, queries, callers, asked, seconds))
    pairs = list(zip(ways["gathered"], ways["alone"], strict=True))
    ratios = {
        f"{figure}_ratio": round(statistics.median(one[figure] / other[figure] for one, other in pairs), 3)
        for figure in ("rate", "p50", "p99")
    }
    return {
        "queries_per_s": round(statistics.median(one["rate"] for one, _ in pairs), 1),
        "queries_per_s_alone": round(statistics.median(other["rate"] for _, other in pairs), 1),
        "mean_batch": round(statistics.median(one["batch"] for one, _ in pairs), 2),
        **ratios,
    }


def measure(
    store: Store, queries: np.ndarray, callers: int, settings: GatherSettings, seconds: float
) -> dict[str, float]:
    """One round of one way: queries/s, the median and 99th percentile in ms, and the mean batch."""
    return asyncio.run(_measured(store, queries, callers, settings, seconds))


async def _measured(
    store: Store, queries: np.ndarray, callers: int, settings: GatherSettings, seconds: float
) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    took: list[float] = []
    with ThreadPoolExecutor(settings.at_once) as threads:

        def answers(asked: np.ndarray) -> list[Any]:
            found = store.search(asked, K)
            return list(zip(found.rows, found.scores, strict=True))

        async def search(key: int, asked: np.ndarray) -> list[Any]:
            return await loop.run_in_executor(threads, answers, asked)

        gatherer: Gatherer[int, Any] = Gatherer(search, settings)
        began = time.perf_counter()

        async def caller(number: int) -> None:
            at = number * 7919
            while (now := time.perf_counter()) - began < seconds:
                place = at % len(queries)
                await gatherer.search(K, queries[place : place + 1])
                took.append(time.perf_counter() - now)
                at += 1

        await asyncio.gather(*(caller(number) for number in range(callers)))
        passed = time.perf_counter() - began
    p50, p99 = np.percentile(took, [50, 99]) * 1e3
    return {
        "rate": len(took) / passed,
        "p50": float(p50),
        "p99": float(p99),
        "batch": gatherer.queries / max(1, gatherer.searches),
    }


def main(arguments: Sequence[str]) -> int:
    """From the command line: prints what `run` returns."""
    parser = argparse.ArgumentParser(prog="headrace bench gathering", description=__doc__)
    usual = GatherSettings()
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--backend", default="host", help="auto, host or rapids")
    parser.add_argument("--index", default="graph")
    parser.add_argument("--at-once", type=int, default=usual.at_once)
    parser.add_argument("--batch", type=int, default=usual.most)
    parser.add_argument("--window-ms", type=float, default=usual.window * 1e3)
    asked = parser.parse_args(list(arguments))
    found = run(
        backend=resolve(asked.backend),
        rows=asked.rows,
        dim=asked.dim,
        seed=asked.seed,
        seconds=asked.seconds,
        rounds=asked.rounds,
        kind=asked.index,
        settings=GatherSettings(asked.at_once, asked.batch, asked.window_ms / 1e3),
    )
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
