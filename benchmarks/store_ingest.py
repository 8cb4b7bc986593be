"""What a search waits while the store ingests at half the rate that it can sustain, against a store that does nothing.

That is measured twice: as the ingest left it, with the same segments, which says what ingesting takes from searches;
and at rest, when it has become one segment, which says what new rows cost besides.

Queries come in at times drawn beforehand (Poisson), whatever becomes of the ones before, and their wait counts from
the moment they were due: a stall is paid for by every query that it held up.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.progress import progress
from benchmarks.report import criterion, quantiles, spread
from benchmarks.store_setup import BATCH, Filled, K, Part, Setup
from benchmarks.store_upkeep import Maintainer
from benchmarks.vectors import Vectors
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.rows import Batch

__all__ = ["due_times", "run"]

RATE = 100.0
"""Queries per second: a few per cent of what one thread can answer, so that they seldom wait for each other."""
SECONDS = 8.0
ROUNDS = 3
SMALL = 64
"""Rows of one batch at half the rate: what comes in a few hundredths of a second."""
AIM = 1.5


def run(setup: Setup) -> Part:
    """Quantiles of the wait, at rest, ingesting and idle by turns on the same store."""
    seconds, rounds, rate = (1.0, 1, 50.0) if setup.quick else (SECONDS, ROUNDS, RATE)
    data = setup.docstrings
    half = len(data.rows) // 2
    filled = Filled(setup.empty(data.dim, IndexSpec("graph")))
    filled.fill(data.rows[:half], title=f"store over {half:,} x {data.dim}")
    with progress("the rate that can be sustained"):
        sustained = _sustained(filled, data, half, half + max(1, len(data.rows) // 4))
    source = _more(filled, data, half + len(data.rows) // 4)
    rest, idle, busy, applied = [], [], [], []
    with progress("searching, idle and while ingesting") as report:
        for at in range(rounds):
            report(3 * at, 3 * rounds)
            waits = due_times(rate, seconds, setup.seed + at)
            filled.settle()
            rest.append(quantiles(_waits(filled, data, waits)))
            report(3 * at + 1, 3 * rounds)
            with _Ingest(filled, source, sustained / 2) as ingest:
                busy.append(quantiles(_waits(filled, data, waits)))
            applied.append(ingest.rate)
            report(3 * at + 2, 3 * rounds)
            idle.append(quantiles(_waits(filled, data, waits)))
    table: dict[str, Any] = {
        name: {which: spread(one[which] for one in found) for which in ("p50", "p95", "p99", "max")}
        for name, found in (("at rest, ms", rest), ("idle, same segments, ms", idle), ("ingesting, ms", busy))
    }
    aims = []
    for name, against in (("idle, same segments", idle), ("at rest", rest)):
        pairs = {
            which: spread(_over(one[which], other[which]) for one, other in zip(busy, against, strict=True))
            for which in ("p50", "p95", "p99")
        }
        table[f"ingesting / {name}"] = pairs
        aims.append(criterion(f"ingest: search p99 against {name}", pairs["p99"]["median"], "times", f"<= {AIM}"))
    about = {
        "sustainable, vectors/s": sustained,
        "ingested, vectors/s": spread(applied),
        "queries/s": rate,
        "queries a round": len(waits),
    }
    return Part({"search while ingesting": table, "search while ingesting: about": about}, aims)


def due_times(rate: float, seconds: float, seed: int) -> npt.NDArray[np.float64]:
    """Moments, in seconds from the start, at which queries are due: a Poisson process, at least one of them."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(1.0 / rate, size=max(1, int(rate * seconds * 2)))
    times = np.cumsum(gaps)
    found: npt.NDArray[np.float64] = times[times < seconds]
    return found if len(found) else times[:1]


def _sustained(filled: Filled, data: Vectors, start: int, end: int) -> float:
    """Vectors per second from the first apply until all of them are sealed and merged, never far behind."""
    batches = list(filled.batches(data.rows[start:end], first=start))
    began = time.perf_counter()
    with Maintainer(filled.store) as maintainer:
        for number, batch in enumerate(batches):
            filled.store.apply(batch)
            if number % 16 == 15:
                maintainer.keep_up()
        maintainer.wait()
    # The rows that are left in the growing segment have had no index built for them yet.
    growing: int = sum(one["rows"] for one in filled.store.statistics()["segments"] if one["kind"] == "growing")
    return max(end - start - growing, BATCH) / (time.perf_counter() - began)


def _more(filled: Filled, data: Vectors, start: int) -> Iterator[Batch]:
    """New rows from `start` on, then all ids again, for ever."""
    for begin in itertools.chain(range(start, len(data.rows), SMALL), itertools.cycle(range(0, len(data.rows), SMALL))):
        rows = data.rows[begin : begin + SMALL]
        yield filled.upserts(range(begin, begin + len(rows)), rows)


def _waits(filled: Filled, data: Vectors, due: npt.NDArray[np.float64]) -> list[float]:
    """Milliseconds from when each query was due to its answer."""
    waits = []
    queries = itertools.cycle(data.queries[at : at + 1] for at in range(len(data.queries)))
    began = time.perf_counter()
    for moment in due.tolist():  # Python's own numbers: the report takes no others
        time.sleep(max(0.0, began + moment - time.perf_counter()))
        filled.store.search(next(queries), K)
        waits.append((time.perf_counter() - began - moment) * 1e3)
    return waits


class _Ingest:
    """Applies batches at a fixed rate in a thread of its own, with a maintainer beside it."""

    def __init__(self, filled: Filled, source: Iterator[Batch], rate: float) -> None:
        self._filled, self._source, self._wanted = filled, source, rate
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ingest", daemon=True)
        self._maintainer = Maintainer(filled.store)
        self.rate = 0.0

    def __enter__(self) -> _Ingest:
        self._maintainer.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._maintainer.__exit__()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        rows, began = 0, time.perf_counter()
        try:
            while not self._stop.wait(max(0.0, began + rows / self._wanted - time.perf_counter())):
                batch = next(self._source)
                self._filled.store.apply(batch)
                rows += len(batch)
        except BaseException as error:  # noqa: BLE001  # the caller raises it
            self._error = error
        self.rate = rows / (time.perf_counter() - began)


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
