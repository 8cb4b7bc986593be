"""Sealing and merging: in the background, within budgets, seen by nobody until it is done.

A job is planned under the lock, gathers and builds without it, and swaps its segment in under it. Rows that die or
change their cell meanwhile are carried over at the swap, which copies two columns and no more; the places of the ids
are entered afterwards, a few thousand at a time.

A growing segment that is full is searched exactly until it is sealed, so sealing does not wait for a long merge: while
one job runs, another may seal.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from headrace.gpu.asked import Asked
from headrace.gpu.backend import Array, Backend
from headrace.gpu.budget import Budget, job_bytes
from headrace.gpu.calibrate import calibrate
from headrace.gpu.columns import Columns
from headrace.gpu.ids import IdColumn
from headrace.gpu.index_spec import IndexSpec, build_params
from headrace.gpu.merge import MergePolicy, SegmentSize, make_room, plan
from headrace.gpu.merge import settle as settled
from headrace.gpu.segments import Sealed
from headrace.gpu.table import Part, Source, Table, forwarding
from headrace.gpu.usage import held, segment_bytes
from headrace.gpu.versions import Versions

__all__ = ["Maintenance", "seal_rows_that_fit"]

log = logging.getLogger("headrace.gpu")

_GATHER_ROWS = 1 << 16
_STEP = 1 << 12
_PAUSE = 0.001
_FEWEST = 64
_DEAD_WHEN_TIGHT = 0.1
_DEAD_WHEN_LACKING = 0.01
"""Shares of deleted rows at which a segment is rewritten while room is short (`Budget.tight`), and while the rows that
were refused still have none (`Budget.lacking`): a hundred rows are written anew for one at most."""
_SECONDS_PER_ROW = 2e-4
"""Of a build, until one has been seen."""


def seal_rows_that_fit(wanted: int, spec: IndexSpec, dim: int, budget: Budget) -> int:
    """Rows at which a growing segment is full: `wanted`, or as many as can be sealed within the budget."""
    rows = wanted
    while rows > _FEWEST and job_bytes(build_params(spec, rows, dim), rows, dim, 0) > budget.largest_job:
        rows = rows * 3 // 4
    if rows < wanted:
        log.info("a growing segment is sealed at %d rows, not %d: more would not fit into the budget", rows, wanted)
    return rows


class Maintenance:
    """Rewrites the segments of one store. Thread-safe; of several jobs at a time all but the first only seal."""

    def __init__(
        self,
        table: Table,
        backend: Backend,
        dim: int,
        metric: str,
        spec: IndexSpec,
        policy: MergePolicy,
        budget: Budget,
        threads: int,
        settle_after: float,
        asked: Asked,
    ) -> None:
        self._table, self._backend, self._dim, self._metric = table, backend, dim, metric
        self._spec, self._policy, self._budget, self._threads = spec, policy, budget, threads
        self._settle_after, self._seconds_per_row = settle_after, _SECONDS_PER_ROW
        self._asked = asked
        self._claimed: set[int] = set()  # serials of segments that a job is rewriting; under the table's lock
        self._swapping = threading.Lock()
        self._params = functools.lru_cache(64)(build_params)

    def wanted(self) -> bool:
        """Is there a job that fits? Cheap enough to ask after every apply."""
        with self._table.lock:
            return bool(self._plan())

    @property
    def rewriting(self) -> int:
        """Segments that are being rewritten now."""
        return len(self._claimed)

    def run(self, *, settle: bool = False) -> bool:
        """Do the best job; False if there is none.

        Takes seconds to minutes on the calling thread, which must not be an event loop.

        Parameters
        ----------
        settle : bool
            Do not wait for a rest before everything becomes one segment.
        """
        while settle and self._claimed:
            time.sleep(_PAUSE)
        with self._table.lock:
            self._budget.holds(self._table, held(self._table))
            chosen = self._plan(settle=settle)
            if any(part.segment is self._table.growing for part in chosen):
                self._table.freeze()
            sources: list[Source] = [(part.segment, np.flatnonzero(part.marks.alive)) for part in chosen]
            size = sum(self._job_bytes(part) for part in chosen)
            serials = {part.segment.serial for part in chosen}
            self._claimed |= serials
        if not chosen:
            return False
        try:
            with self._budget.job(size) as granted:
                if not granted:  # another store's job was quicker
                    return False
                self._rewrite(sources)
            return True
        finally:
            with self._table.lock:
                self._claimed -= serials

    def _plan(self, *, settle: bool = False) -> list[Part]:
        everything = [
            part for part in self._table.parts.values() if len(part.marks) and part.segment.serial not in self._claimed
        ]
        # What comes alive in a segment after it was chosen would be lost with it.
        everything = [part for part in everything if not part.arriving]
        parts = [part for part in everything if part.segment is not self._table.growing]
        if self._claimed:
            parts = [part for part in parts if part.frozen]
        if parts and (chosen := plan(self._sizes(parts), self._policy, self._budget.room)):
            return [parts[position] for position in chosen]
        if self._claimed:
            return []
        if everything and self._budget.tight:
            least = _DEAD_WHEN_LACKING if self._budget.lacking else _DEAD_WHEN_TIGHT
            if chosen := make_room(self._sizes(everything), min(least, self._policy.dead_share), self._budget.room):
                return [everything[position] for position in chosen]
        if everything and (settle or self._rested(sum(part.marks.live for part in everything))):
            sizes = [
                replace(size, frozen=size.frozen or part.segment is self._table.growing)
                for size, part in zip(self._sizes(everything), everything, strict=True)
            ]
            return [everything[position] for position in settled(sizes, self._policy, self._budget.room)]
        return []

    def _rested(self, rows: int) -> bool:
        """Has nothing been written for as long as a merge of everything would take, and `settle_after`?"""
        rest = time.monotonic() - self._table.changed_at
        return rest >= max(self._settle_after, rows * self._seconds_per_row)

    def _sizes(self, parts: Sequence[Part]) -> list[SegmentSize]:
        return [
            SegmentSize(
                len(part.marks),
                part.marks.live,
                part.frozen,
                self._job_bytes(part),
                sum(segment_bytes(part).values()),
            )
            for part in parts
        ]

    def _job_bytes(self, part: Part) -> int:
        live, size = part.marks.live, part.segment.nbytes()
        columns = (size["ids"] + size["columns"]) * live // max(1, len(part.marks))
        # Parameters change little with the rows: those for the next power of two are settled once.
        params = self._params(self._spec, 1 << live.bit_length(), self._dim)
        return job_bytes(params, live, self._dim, columns) if live else 0

    def _rewrite(self, sources: Sequence[Source]) -> None:
        rows = sum(len(live) for _, live in sources)
        began = time.monotonic()
        sealed = self._build(sources, rows) if rows else None
        if rows >= _FEWEST:
            self._seconds_per_row = (time.monotonic() - began) / rows
        way = None if sealed is None else forwarding(sources, sealed)
        table = self._table
        with self._swapping:  # the places of one job are entered before the next one's, never all at once
            with table.lock:
                table.replace(sources, sealed, way)
                table.publish()
                self._budget.holds(table, held(table))
            more = True
            while more:
                # A lock that is taken again at once is seldom had by those who wait for it.
                time.sleep(_PAUSE)
                with table.lock:
                    more = table.directory.step(_STEP)
        log.debug("sealed %d rows of %d segments", rows, len(sources))

    def _build(self, sources: Sequence[Source], rows: int) -> Sealed:
        params = build_params(self._spec, rows, self._dim)
        kind = self._backend.kinds[params.kind]
        vectors = self._gather(sources, rows, params.dtype)
        index: Any = kind.build(vectors, self._metric, params, threads=self._threads)
        sealed = Sealed(
            self._backend,
            params,
            index,
            calibrate(
                self._backend,
                kind,
                index,
                vectors,
                self._metric,
                recall_target=self._spec.recall_target,
                asked=self._asked.latest(),
            ),
            IdColumn.gather([(segment.ids, live) for segment, live in sources]),
            Versions.concatenate([segment.versions.take(live) for segment, live in sources]),
            Columns.gather(self._backend.xp, [(segment.columns, live) for segment, live in sources]),
        )
        sealed.warn(self._spec.recall_target)
        return sealed

    def _gather(self, sources: Sequence[Source], rows: int, dtype: str) -> Array:
        """The sources' vectors, (rows, dim), copied piece by piece so that nothing is there three times."""
        vectors = self._backend.xp.empty((rows, self._dim), dtype=dtype)
        at = 0
        for segment, live in sources:
            for start in range(0, len(live), _GATHER_ROWS):
                piece = live[start : start + _GATHER_ROWS]
                vectors[at : at + len(piece)] = segment.vectors_of(piece)
                at += len(piece)
        return vectors
