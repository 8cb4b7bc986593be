"""What the parts of `benchmarks.store` share: the vectors, and stores filled with them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import vectors
from benchmarks.progress import progress
from benchmarks.report import Criterion
from benchmarks.store_raw import METRIC, K, RawGraph, RawKind
from benchmarks.store_recall import Floats, Ints, matrix
from benchmarks.vectors import Vectors
from headrace.gpu.backend import Backend
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.rows import DELETED, Action, Batch
from headrace.gpu.store import Store, StoreSettings

__all__ = ["BATCH", "METRIC", "Filled", "K", "Part", "Setup"]

BATCH = 256
CELLS = 64
"""Cells that the rows are spread over: as in a collection, whose defaults these are."""


@dataclass
class Part:
    """What one part of the benchmark found: sections of the report, and criteria."""

    results: dict[str, Any] = field(default_factory=dict)
    criteria: list[Criterion] = field(default_factory=list)


@dataclass(frozen=True)
class Setup:
    """What was asked for, and what several parts need and only one has to make.

    Attributes
    ----------
    backend : Backend
    rows : int
        Of the docstrings' vectors.
    seed : int
    quick : bool
        Small made-up data and few rounds: whether it works, not how fast.
    threads : int
        Of batched searches, the store's and the raw library's alike, and of the raw library's index builds.
    cache : Path
    glove_path : str, optional
    """

    backend: Backend
    rows: int
    seed: int
    quick: bool
    threads: int
    cache: Path
    glove_path: str | None = None
    _raw: dict[tuple[str, tuple[int, ...]], RawGraph] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def docstrings(self) -> Vectors:
        if self.quick:
            return vectors.clustered(self.rows, 64, seed=self.seed, queries=200, clusters=32)
        return vectors.docstrings(self.rows, self.cache, seed=self.seed, threads=self.threads)

    @cached_property
    def glove(self) -> Vectors:
        if self.quick:
            return vectors.clustered(self.rows, 32, seed=self.seed + 1, queries=200, clusters=32)
        return vectors.glove(self.cache, path=self.glove_path, seed=self.seed)

    @property
    def rounds(self) -> int:
        """Of a comparison."""
        return 2 if self.quick else 7

    def settings(self, *, seal_rows: int | None = None) -> StoreSettings:
        """A store's defaults; smaller segments for a quick run, so that there are several."""
        if self.quick and seal_rows is None:
            seal_rows = max(256, self.rows // 8)
        usual = StoreSettings()
        return usual if seal_rows is None else dataclasses.replace(usual, seal_rows=seal_rows)

    def empty(
        self, dim: int, spec: IndexSpec, *, ids: str = "integer", seal_rows: int | None = None, backend: Any = None
    ) -> Store:
        """A store without rows."""
        chosen = backend or self.backend
        return Store(chosen, dim, METRIC, self.settings(seal_rows=seal_rows), index=spec, ids=ids)

    def raw_graph(self, data: Vectors) -> RawGraph:
        """The raw library's graph over all rows of `data`, with the parameters that the store takes for as many."""
        key = data.name, data.rows.shape
        if key not in self._raw:
            kind = RawGraph if self.backend.name == "host" else RawKind
            with progress(f"{kind.name} over {len(data.rows):,} x {data.dim}"):
                self._raw[key] = kind(self.backend, data.rows, self.threads)
        return self._raw[key]


class Filled:
    """A store and the log that would have filled it: whole numbers as ids, offsets that rise.

    Batches are made before they are applied, so that making them is not what is timed.
    """

    def __init__(self, store: Store, *, ids: Callable[[int], int | str] = int) -> None:
        self.store = store
        self._name, self._offset = ids, 0

    def upserts(
        self, tags: Sequence[int] | Ints, rows: Floats, attributes: Mapping[str, Sequence[Any]] | None = None
    ) -> Batch:
        """A batch that gives each tag its row, float32 (n, dim), and its attributes."""
        count = len(tags)
        numbers = np.asarray(tags, dtype=np.int64)
        return Batch(
            ids=[self._name(tag) for tag in numbers.tolist()],
            topic_partitions=np.zeros(count, dtype=np.int32),
            offsets=self._offsets(count),
            timestamps=np.zeros(count, dtype=np.int64),
            cells=(numbers % CELLS).astype(np.int32),
            actions=np.full(count, Action.HOLD, dtype=np.uint8),
            vectors=rows,
            attributes=dict(attributes or {}),
        )

    def deletes(self, tags: Sequence[int] | Ints) -> Batch:
        """A batch that deletes them."""
        count = len(tags)
        return Batch(
            ids=[self._name(tag) for tag in np.asarray(tags).tolist()],
            topic_partitions=np.zeros(count, dtype=np.int32),
            offsets=self._offsets(count),
            timestamps=np.zeros(count, dtype=np.int64),
            cells=np.full(count, DELETED, dtype=np.int32),
            actions=np.full(count, Action.DROP, dtype=np.uint8),
            vectors=np.empty((0, self.store.dim), dtype=np.float32),
        )

    def batches(
        self, rows: Floats, *, first: int = 0, size: int = BATCH, attributes: Mapping[str, Sequence[Any]] | None = None
    ) -> Iterator[Batch]:
        """Batches that give the tags from `first` on the rows, in order."""
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            named = {name: values[start : start + size] for name, values in (attributes or {}).items()}
            yield self.upserts(range(first + start, first + start + len(part)), part, named)

    def fill(self, rows: Floats, *, attributes: Mapping[str, Sequence[Any]] | None = None, title: str = "") -> None:
        """Apply all rows, sealing and merging in between, until nothing is left to be done."""
        with progress(title or f"store over {len(rows):,} x {self.store.dim}") as report:
            done = 0
            for batch in self.batches(rows, attributes=attributes):
                self.store.apply(batch)
                done += len(batch)
                if self.store.wants_maintenance():
                    report(done, len(rows))
                    self.store.maintain()
            self.settle()
            report(len(rows), len(rows))

    def settle(self) -> None:
        """Seal and merge until there is nothing to do."""
        while self.store.maintain(settle=True):
            pass

    def ids(self, queries: Floats, **options: Any) -> Ints:
        """Ids of the `K` nearest rows, int64 (q, K), -1 where there are fewer."""
        found = self.store.search(queries, K, **options)
        return matrix([[int(row.id) for row in rows] for rows in found.rows], K)

    def _offsets(self, count: int) -> npt.NDArray[np.int64]:
        self._offset += count
        return np.arange(self._offset - count, self._offset, dtype=np.int64)
