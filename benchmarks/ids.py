"""What does an id cost, in memory and in time, and does anything stop while the map grows?

Ids come in batches of 256, as records do, and are sealed in segments as large as merges make them; then batches of
several sizes are looked up the way an apply does: hashed, found in the map, compared with the id that is stored. A
Python dictionary from id to place is measured beside it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import quantiles
from headrace.gpu.ids import IdColumn, hash_ids
from headrace.gpu.merge import MergePolicy
from headrace.gpu.places import Directory, places_of
from headrace.gpu.rows import Id

__all__ = ["main", "run"]

BATCH = 256
FINDS = {1: 2000, 256: 1000, 10_000: 50}
"""Lookups measured, by ids in each."""
DICTIONARY = 1_000_000
"""Ids that the dictionary is given at most; it takes the same for each, however many there are."""
WORD = 20
"""Letters of a string id."""


def run(count: int = 10_000_000, seed: int = 0) -> dict[str, Any]:
    """Measure both kinds of ids, `count` of each; figures by kind."""
    return {kind: _measure(kind, count, seed) for kind in ("string", "integer")}


class Ids:
    """Ids in segments and the way to them, as a store keeps them."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.segments: list[IdColumn] = [IdColumn(kind)]
        self.directory = Directory(lambda serial, rows, ids: self.segments[serial].same(rows, ids))

    def add(self, ids: Sequence[Id]) -> None:
        """Enter new ids, as an apply does."""
        hashes = hash_ids(ids, self.kind)
        entries, _ = self.directory.find(hashes, ids)
        column = self.segments[-1]
        first = len(column)
        column.append(ids, hashes)
        rows = np.arange(first, first + len(ids))
        self.directory.change(hashes, entries, places_of(len(self.segments) - 1, rows))

    def seal(self) -> None:
        """Pack the newest segment and begin another."""
        self.segments[-1] = self.segments[-1].take(np.arange(len(self.segments[-1])))
        self.segments.append(IdColumn(self.kind))

    def find(self, ids: Sequence[Id]) -> npt.NDArray[np.int64]:
        return self.directory.find(hash_ids(ids, self.kind), ids)[1]


def _measure(kind: str, count: int, seed: int) -> dict[str, Any]:
    ids, rng = Ids(kind), np.random.default_rng(seed)
    added: list[float] = []
    first = 0
    while first < count:
        batch = _made(kind, range(first, min(count, first + BATCH)))
        began = time.perf_counter()
        ids.add(batch)
        added.append(time.perf_counter() - began)
        first += len(batch)
        if len(ids.segments[-1]) >= min(MergePolicy().max_rows, max(1, count // 5)):
            ids.seal()
    ids.seal()
    columns = sum(column.nbytes for column in ids.segments)
    found: dict[str, Any] = {
        "ids": count,
        "map_bytes_per_id": ids.directory.nbytes / count,
        "sealed_column_bytes_per_id": columns / count,
        "add": _speed(added, BATCH),
        "find": {},
        "find_unknown": {},
    }
    for size, times in FINDS.items():
        known, unknown = [], []
        for _ in range(times):
            known.append(_timed(ids, kind, rng.integers(0, count, size), known=True))
            unknown.append(_timed(ids, kind, rng.integers(count, 2 * count, size), known=False))
        found["find"][str(size)], found["find_unknown"][str(size)] = _speed(known, size), _speed(unknown, size)
    del ids
    gc.collect()
    return {**found, "dictionary": _dictionary(kind, min(count, DICTIONARY), rng)}


def _timed(ids: Ids, kind: str, numbers: npt.NDArray[np.int64], *, known: bool) -> float:
    asked = _made(kind, numbers.tolist())
    began = time.perf_counter()
    places = ids.find(asked)
    taken = time.perf_counter() - began
    if not (places >= 0 if known else places < 0).all():
        raise AssertionError(f"the map has lost or invented {kind} ids: this is an error in Headrace")
    return taken


def _dictionary(kind: str, count: int, rng: np.random.Generator) -> dict[str, Any]:
    where: dict[Id, int] = {}
    added: list[float] = []
    for first in range(0, count, BATCH):
        batch = _made(kind, range(first, min(count, first + BATCH)))
        began = time.perf_counter()
        where.update(zip(batch, range((1 << 40) + first, (1 << 40) + first + len(batch)), strict=True))
        added.append(time.perf_counter() - began)
    objects = sum(sys.getsizeof(one) + sys.getsizeof(place) for one, place in islice(where.items(), 1000)) / 1000
    found = []
    for _ in range(FINDS[BATCH]):
        asked = _made(kind, rng.integers(0, count, BATCH).tolist())
        began = time.perf_counter()
        places = list(map(where.get, asked))
        found.append(time.perf_counter() - began)
        assert None not in places
    return {
        "ids": count,
        "bytes_per_id": sys.getsizeof(where) / count + objects,
        "add": _speed(added, BATCH),
        "find": {str(BATCH): _speed(found, BATCH)},
    }


def _made(kind: str, numbers: Sequence[int]) -> list[Id]:
    return [f"{number:0{WORD}}" for number in numbers] if kind == "string" else list(numbers)


def _speed(seconds: Sequence[float], size: int) -> dict[str, float | None]:
    """Microseconds for a batch, and ids a second of all batches together."""
    times = quantiles([one * 1e6 for one in seconds])
    del times["count"]
    return {"ids_per_s": size * len(seconds) / sum(seconds), **{f"{name}_us": value for name, value in times.items()}}


def main(argv: Sequence[str]) -> int:
    """Measure by itself and print JSON: ``python -m benchmarks.ids --ids 1000000``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ids", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    print(json.dumps(run(asked.ids, asked.seed), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
