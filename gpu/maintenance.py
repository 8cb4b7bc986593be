"""Sealing and merging: in the background, within budgets, seen by nobody until it is done.

A job is planned under the lock, gathers and builds without it, and swaps its segment in under it. Rows that die or
change their cell meanwhile are carried over at the swap, which copies two columns and no more; the places of the ids
are entered afterwards, a few thousand at a time.

A growing segment that is full is searched exactly until it is sealed, so sealing does not wait for a long merge: while
one job runs, another may seal.

Where an index can take in more rows (`headrace.gpu.backend.IndexKind.extension`), the largest of the segments that
become one is copied and the others' rows are added to it, as Lucene and Qdrant do: to find a row's links takes over
a hundred times as long as to copy them.
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
from headrace.gpu.merge import MergePolicy, SegmentSize, base, make_room, plan, written
from headrace.gpu.merge import settle as settled
from headrace.gpu.segments import Sealed, Segment
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
_WAITING = 2
"""Full growing segments that begin a job of their own, while another job adds one to a segment: with fewer, waiting for
that segment takes less than one segment more does."""
_FEW_OF = 32
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
        self._absorbing = False  # is the first of the jobs one that adds full growing segments to another one?
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
            basis, chosen = self._basis(chosen)
            sources: list[Source] = [(part.segment, np.flatnonzero(part.marks.alive)) for part in chosen]
            if basis:
                sources[0] = basis, np.arange(len(basis))  # its dead rows too: a graph has no way to leave them out
            size = sum(self._job_bytes(part, len(sources[at][1])) for at, part in enumerate(chosen))
            serials = {part.segment.serial for part in chosen}
            if first := not self._claimed:
                self._absorbing = basis is not None and all(part.frozen for part in chosen[1:])
            self._claimed |= serials
        if not chosen:
            return False
        try:
            with self._budget.job(size) as granted:
                if not granted:  # another store's job was quicker
                    return False
                self._rewrite(sources, basis)
            return True
        finally:
            with self._table.lock:
                self._claimed -= serials
                self._absorbing = self._absorbing and not first

    def _basis(self, chosen: Sequence[Part]) -> tuple[Sealed | None, list[Part]]:
        """The segment whose index the others are added to, if any, and all of them, that one first."""
        at = base(self._sizes(chosen), self._policy)
        if at is None:
            return None, list(chosen)
        first = chosen[at].segment
        assert isinstance(first, Sealed)
        return first, [chosen[at], *(part for part in chosen if part is not chosen[at])]

    def _plan(self, *, settle: bool = False) -> list[Part]:
        everything = [
            part for part in self._table.parts.values() if len(part.marks) and part.segment.serial not in self._claimed
        ]
        # What comes alive in a segment after it was chosen would be lost with it.
        everything = [part for part in everything if not part.arriving]
        parts = [part for part in everything if part.segment is not self._table.growing]
        if self._claimed and sum(part.frozen for part in parts) < (_WAITING if self._absorbing else 1):
            return []
        if parts and (chosen := self._planned(parts)):
            return [parts[position] for position in chosen]
        if self._claimed:
            return []
        if everything and self._budget.tight:
            least = _DEAD_WHEN_LACKING if self._budget.lacking else _DEAD_WHEN_TIGHT
            if chosen := make_room(self._sizes(everything), min(least, self._policy.dead_share), self._budget.room):
                return [everything[position] for position in chosen]
        rest = time.monotonic() - self._table.changed_at
        if everything and (settle or rest >= self._settle_after):
            sizes = [
                replace(size, frozen=size.frozen or part.segment is self._table.growing)
                for size, part in zip(self._sizes(everything), everything, strict=True)
            ]
            chosen = settled(sizes, self._policy, self._budget.room)
            new = written([sizes[position] for position in chosen], self._policy)
            if settle or rest >= new * self._seconds_per_row:
                return [everything[position] for position in chosen]
        return []

    def _planned(self, parts: Sequence[Part]) -> list[int]:
        return plan(self._sizes(parts), self._policy, self._budget.room, self._budget.largest_job)

    def _sizes(self, parts: Sequence[Part]) -> list[SegmentSize]:
        return [
            SegmentSize(
                len(part.marks),
                part.marks.live,
                part.frozen,
                self._job_bytes(part, part.marks.live),
                sum(segment_bytes(part).values()),
                self._job_bytes(part, len(part.marks)),
                self._extends(part.segment),
            )
            for part in parts
        ]

    def _extends(self, segment: Segment) -> bool:
        if not isinstance(segment, Sealed) or not segment.extends:
            return False
        return segment.params == self._params(self._spec, 1 << len(segment).bit_length(), self._dim)

    def _job_bytes(self, part: Part, rows: int) -> int:
        """Bytes that writing so many of its rows takes."""
        size = part.segment.nbytes()
        columns = (size["ids"] + size["columns"]) * rows // max(1, len(part.marks))
        # Parameters change little with the rows: those for the next power of two are settled once.
        params = self._params(self._spec, 1 << rows.bit_length(), self._dim)
        return job_bytes(params, rows, self._dim, columns) if rows else 0

    def _rewrite(self, sources: Sequence[Source], basis: Sealed | None) -> None:
        rows = sum(len(live) for _, live in sources)
        began = time.monotonic()
        sealed = self._build(sources, rows, basis) if rows else None
        new = rows - (len(basis) if basis else 0)
        if new >= max(_FEWEST, rows // _FEW_OF):  # of fewer, copying what was there takes most of the time
            self._seconds_per_row = (time.monotonic() - began) / new
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
        log.debug("sealed %d rows of %d segments, %d of them anew", rows, len(sources), new)

    def _build(self, sources: Sequence[Source], rows: int, basis: Sealed | None) -> Sealed:
        params = build_params(self._spec, rows, self._dim)
        kind = self._backend.kinds[params.kind]
        index: Any
        if basis is None or basis.extension is None:
            vectors = self._gather(sources, rows, params.dtype)
            index = kind.build(vectors, self._metric, params, threads=self._threads)
        else:
            index = basis.extension(self._gather(sources[1:], rows - len(basis), params.dtype), threads=self._threads)
            vectors = kind.vectors(index, self._backend.xp.arange(rows))
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
