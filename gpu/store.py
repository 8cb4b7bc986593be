"""A worker's rows of one collection: apply versions, search, and never show anything in between.

This is the door; behind it `headrace.gpu.applying` decides, `headrace.gpu.table` keeps, `headrace.gpu.reading` answers
and `headrace.gpu.maintenance` tidies up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import reading, usage
from headrace.gpu.applying import decide
from headrace.gpu.backend import Backend
from headrace.gpu.budget import Budget
from headrace.gpu.digests import DigestedRows, digested
from headrace.gpu.errors import ConfigError, StoreFull
from headrace.gpu.filters import Filter
from headrace.gpu.ids import hash_ids
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.maintenance import Maintenance, seal_rows_that_fit
from headrace.gpu.places import by_segment, rows_of
from headrace.gpu.rows import DELETED, Action, Applied, Batch, Found, Id, StoredRow
from headrace.gpu.segments import Growing, View
from headrace.gpu.store_settings import StoreSettings
from headrace.gpu.table import Table

__all__ = ["Applied", "Found", "Store", "StoreSettings", "StoredRow", "View"]

_HOLD = int(Action.HOLD)
_PER_ID = 64
_PER_VALUE = 32


class Store:
    """Rows of one collection on one worker.

    Parameters
    ----------
    backend : Backend
    dim : int
    metric : {"cosine", "ip", "l2"}
        For cosine, vectors and queries are handed in normalised.
    settings : StoreSettings, optional
    index : IndexSpec
        Of sealed segments; its dtype is that of growing ones too.
    ids : {"string", "integer"}
        Kind of every id.
    budget : Budget, optional
        Shared with the worker's other stores; by default one of its own.

    Notes
    -----
    Thread-safe. `apply`, `forget`, `drop_cells` take the lock for the length of one batch; `search`, `scan`, `digests`
    work on a view without it; `maintain` builds indexes outside the lock and swaps them in under it.
    """

    def __init__(
        self,
        backend: Backend,
        dim: int,
        metric: str,
        settings: StoreSettings | None = None,
        *,
        index: IndexSpec = IndexSpec(),  # noqa: B008 - frozen
        ids: str = "string",
        budget: Budget | None = None,
    ) -> None:
        if ids not in ("string", "integer"):
            raise ConfigError(f"unknown kind of ids {ids!r}: use 'string' or 'integer'")
        settings = settings or StoreSettings()
        self.dim, self.metric, self.index, self.ids = dim, metric, index, ids
        self._backend = backend
        self._budget = budget or Budget(settings.memory_limit, settings.maintenance_memory)
        self._full = False
        seal_rows = seal_rows_that_fit(settings.seal_rows, index, dim, self._budget)
        self._table = Table(lambda: Growing(backend, dim, metric, index.dtype, ids, seal_rows), seal_rows, ids)
        self._maintenance = Maintenance(
            self._table,
            backend,
            dim,
            metric,
            index,
            settings.merge,
            self._budget,
            settings.build_threads,
            settings.settle_after,
        )

    # -- writing -------------------------------------------------------------------------------------------------------

    def apply(self, batch: Batch, stamp: Mapping[int, int] | None = None) -> Applied:
        """Apply a header: per id the highest version wins; anything known already changes nothing.

        Parameters
        ----------
        batch : Batch
            Each id at most once.
        stamp : mapping of int to int, optional
            Becomes visible together with the rows.

        Returns
        -------
        Applied
            `missing` lists the rows (positions in the batch) told to KEEP that are not here.

        Raises
        ------
        ValueError
            There is not one vector of `dim` numbers for each row to hold, or a number is too large for float16.
        RecordError
            An attribute is not of its column's kind.
        StoreFull
            Rows to hold would pass the memory limit.

            After any of these nothing has been changed.
        """
        self._check(batch)
        hashes = hash_ids(batch.ids, self.ids)
        table = self._table
        with table.lock:
            entries, places, known = table.known(hashes, batch.ids)
            if batch.instead is not None:  # in a damaged store a dead row may still be known
                known = replace(known, live=table.cells_of(places) != DELETED)
            decision = decide(batch, known)
            if len(decision.insert):
                self._admit(batch, len(decision.insert))
            table.carry_out(decision, batch, hashes, entries, places)
            table.publish(stamp)
        return Applied(len(decision.insert), len(decision.kill), decision.foreign, tuple(decision.missing.tolist()))

    def _check(self, batch: Batch) -> None:
        held = int(np.count_nonzero(batch.actions == _HOLD))
        if len(batch.vectors) != held or (held and batch.vectors.shape[1:] != (self.dim,)):
            raise ValueError(f"vectors have shape {batch.vectors.shape}: {held} rows to hold need ({held}, {self.dim})")
        if self.index.dtype == "float16" and held:
            largest = float(np.abs(batch.vectors).max())
            if largest > float(np.finfo(np.float16).max):
                raise ValueError(f"a vector has the number {largest:g}, too large for float16: use dtype float32")

    def _admit(self, batch: Batch, rows: int) -> None:
        """Raise `StoreFull` if there is no room for `rows` rows of `batch`."""
        if self._budget.limit is None:
            return
        self._budget.holds(self._table, usage.held(self._table))
        more = self._table.growing.growth(rows) + rows * (_PER_ID + _PER_VALUE * len(batch.attributes))
        try:
            self._budget.admit(more)
        except StoreFull:
            self._full = True
            raise
        self._full = False

    def forget(self, stable: Mapping[int, int]) -> None:
        """Drop remembered deletions below `stable`: offsets below which nothing older will be delivered any more.

        Not to be called while rows move between workers: a moved row carries an old version.
        """
        with self._table.lock:
            self._table.remembered.forget(stable)

    def drop_cells(self, keep: frozenset[int]) -> int:
        """Remove the rows of all cells that are not in `keep`; returns how many."""
        with self._table.lock:
            dropped = self._table.drop(np.fromiter(keep, dtype=np.int32, count=len(keep)))
            self._table.publish()
        return dropped

    def stamp(self, stamp: Mapping[int, int]) -> None:
        """Publish a new stamp with no rows."""
        with self._table.lock:
            self._table.publish(stamp)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The current moment. Cheap; never changes once taken."""
        return self._table.view

    def search(
        self,
        queries: npt.NDArray[np.float32],
        k: int,
        *,
        where: Filter | None = None,
        cells: frozenset[int] | None = None,
        recall_target: float | None = None,
    ) -> Found:
        """The `k` nearest live rows for each query over all segments of one view.

        Parameters
        ----------
        queries : float32 (q, dim)
        k : int
        where : Filter, optional
            Only rows that pass it.
        cells : frozenset of int, optional
            Only rows of these cells. An exact scan gets cheaper by it where they hold less than an eighth of the rows:
            of 16,384 rows of 384 numbers on one thread, one query takes 1.3 ms over all, 0.3 over a 32nd and 1.1 over
            an eighth; 64 queries 18.7, 1.6 and 5.1 ms. Over a quarter and more, picking the rows costs up to twice
            what it saves.
        recall_target : float, optional
            By default the index's own.
        """
        target = self.index.recall_target if recall_target is None else recall_target
        return reading.search(self.view, self._backend, self.metric, queries, k, target, where, cells)

    def get(self, ids: Sequence[Id], *, vectors: bool = False) -> tuple[list[StoredRow | None], Mapping[int, int]]:
        """Rows by id, None where an id is not here; and the stamp of the moment they were read."""
        hashes = hash_ids(ids, self.ids)
        with self._table.lock:
            _, places, known = self._table.known(hashes, ids)
            stamp = self._table.view.stamp
            parts = {serial: part.view for serial, part in self._table.parts.items()}
        found: list[StoredRow | None] = [None] * len(ids)
        here = np.flatnonzero(known.live)
        for serial, positions in by_segment(places[here]):
            at = here[positions]
            rows = reading.rows_of_part(parts[serial], rows_of(places[at]), vectors=vectors)
            for position, row in zip(at.tolist(), rows, strict=True):
                found[position] = row
        return found, stamp

    def heard(self, ids: Sequence[Id]) -> tuple[list[tuple[int, int, int, int] | None], Mapping[int, int]]:
        """What is known of each id, and the stamp of the moment: topic partition, offset, timestamp and the row's cell
        (`DELETED` if there is no row and only the version is remembered); None for an id never heard of or forgotten.
        """
        hashes = hash_ids(ids, self.ids)
        with self._table.lock:
            _, places, known = self._table.known(hashes, ids)
            cells = self._table.cells_of(places)
            stamp = self._table.view.stamp
        columns = zip((places >= 0).tolist(), known.versions.to_tuples(), cells.tolist(), strict=True)
        return [(*version, cell) if there else None for there, version, cell in columns], stamp

    def scan(
        self, cells: frozenset[int] | None = None, *, vectors: bool = False, batch: int = 1024
    ) -> Iterator[list[StoredRow]]:
        """Live rows of one view in chunks, optionally only of some cells."""
        return reading.scan(self.view, cells, vectors=vectors, batch=batch)

    def sample(self, rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
        """At most `rows` vectors of live rows, drawn without replacement, float32 (n, dim)."""
        return reading.sample(self.view, rows, self.dim, seed)

    def cell_sizes(self, where: Filter | None = None) -> dict[int, int]:
        """Live rows by cell; only those that pass `where`."""
        return reading.cell_sizes(self.view, self._backend, where)

    def digests(self) -> tuple[dict[int, tuple[int, int]], Mapping[int, int]]:
        """Per cell, rows and the order-free sum of `row_digests`, computed from the rows; and the view's stamp."""
        view = self.view
        return reading.digests(view), view.stamp

    def row_digests(self, cells: frozenset[int] | None = None, *, deep: bool = False) -> Iterator[DigestedRows]:
        """One 64-bit digest for each live row of one view, in chunks; see `headrace.gpu.digests`."""
        return digested(self.view, cells, deep=deep)

    def statistics(self) -> dict[str, Any]:
        """`headrace.gpu.usage.statistics`, and under ``memory`` the worker's budget.

        ``memory`` has, in bytes, ``held`` by this store, by ``all`` stores of the worker, ``working`` (taken by sealing
        and merging), the ``limit`` or None; and whether the last rows were refused as ``full``.
        """
        with self._table.lock:
            told = usage.statistics(self._table)
        held = sum(told["bytes"].values())
        budget = self._budget
        budget.holds(self._table, held)
        memory = {"held": held, "all": budget.held, "working": budget.working, "limit": budget.limit}
        return {**told, "memory": {**memory, "full": self._full}}

    # -- in the background ---------------------------------------------------------------------------------------------

    def wants_maintenance(self) -> bool:
        """Is there a segment to seal or to merge? Cheap enough to ask after every apply.

        To be asked now and then while nothing is written, too: a store that rests becomes one segment.
        """
        return self._maintenance.wanted()

    def maintain(self, *, settle: bool = False) -> bool:
        """Rewrite the segments that the policy names into one sealed segment; False when there is nothing to do.

        Runs for seconds on the calling thread, which must not be an event loop; one run at a time. Rows that die or
        change their cell meanwhile are carried over at the swap.

        Parameters
        ----------
        settle : bool
            Nothing more will be written for long: make everything one segment now.
        """
        return self._maintenance.run(settle=settle)
