"""A worker's rows of one collection: apply versions, search, and never show anything in between.

This is the door; behind it `headrace.gpu.applying` decides, `headrace.gpu.table` keeps, `headrace.gpu.reading` answers
and `headrace.gpu.maintenance` tidies up.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu import reading, usage
from headrace.gpu.admission import PER_ID, Admission
from headrace.gpu.applying import decide
from headrace.gpu.asked import Asked
from headrace.gpu.backend import Backend
from headrace.gpu.budget import Budget
from headrace.gpu.digests import DigestedRows, digested
from headrace.gpu.errors import ConfigError, RecordError
from headrace.gpu.filters import Filter
from headrace.gpu.ids import hash_ids
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.maintenance import Maintenance, seal_rows_that_fit
from headrace.gpu.marks import Marks
from headrace.gpu.packed_text import chunks
from headrace.gpu.places import by_segment, rows_of
from headrace.gpu.rows import DELETED, Action, Applied, Batch, Found, Id, Left, StoredRow
from headrace.gpu.segments import Growing, Sealed, View
from headrace.gpu.store_settings import StoreSettings
from headrace.gpu.strays import drop_strays
from headrace.gpu.table import Table

__all__ = ["Applied", "Found", "Left", "Store", "StoreSettings", "StoredRow", "View"]

_DROP, _HOLD = int(Action.DROP), int(Action.HOLD)
_PAUSE = 0.001  # a lock that is taken again at once is seldom had by those who wait for it


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
        self.backend = backend
        self._budget = budget or Budget(settings.memory_limit, settings.maintenance_memory)
        seal_rows = seal_rows_that_fit(settings.seal_rows, index, dim, self._budget)
        self._table = Table(lambda: Growing(backend, dim, metric, index.dtype, ids, seal_rows), seal_rows, ids)
        self._admission = Admission(self._table, self._budget, backend.xp, ids)
        self._asked = Asked()
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
            self._asked,
        )

    def close(self) -> None:
        """It is let go of, and no longer counts against the budget. Whoever still reads it may do so to the end."""
        self._budget.forget(self._table)

    # -- writing -------------------------------------------------------------------------------------------------------

    def apply(
        self, batch: Batch, stamp: Mapping[int, int] | None = None, *, gaps: bool = False, relabel: bool = True
    ) -> Applied:
        """Apply a header: per id the highest version wins; anything known already changes nothing.

        Parameters
        ----------
        batch : Batch
            Each id at most once.
        stamp : mapping of int to int, optional
            Becomes visible together with the rows.
        gaps : bool
            Older records may still come after this batch: what it sends elsewhere counts as `View.moved` even where
            there is no row yet that goes.
        relabel : bool
            A row that is here at just this version takes over the batch's cell. Not for rows out of a snapshot: their
            cells may be older.

        Returns
        -------
        Applied
            `missing` lists the rows (positions in the batch) told to KEEP that are not here.

        Raises
        ------
        ValueError
            There is not one vector of `dim` numbers for each row to hold, or a number is too large for float16.
        RecordError
            An attribute is not of its column's kind, or an id is in the batch twice.

            After either of these nothing has been changed.
        StoreFull
            Rows to hold would pass the memory limit. No row has been written or replaced, and the stamp is the one
            before. But what the batch takes away has gone, because that makes room: doing it again changes nothing.
        RecordTooLarge
            The same, and no tidying up can help: the one row that the batch has to write takes more than an empty
            store has room for. Of several rows this is not said: send them one by one.
        """
        self._check(batch)
        hashes = hash_ids(batch.ids, self.ids)
        if len(set(batch.ids)) < len(batch.ids):
            twice = next(id_ for id_, times in Counter(batch.ids).items() if times > 1)
            raise RecordError(f"the id {repr(twice)[:60]} is in one batch twice: keep its last record only")
        table = self._table
        left: tuple[Left, ...] | None = ()
        with table.lock:
            entries, places, known = table.known(hashes, batch.ids)
            if batch.instead is not None:  # in a damaged store a dead row may still be known
                known = replace(known, live=table.cells_of(places) != DELETED)
            decision = decide(batch, known)
            if not relabel:
                decision = replace(decision, relabel=decision.relabel[:0])
            decision, refused = self._admission.admit(batch, decision)
            # A batch that is tried again and again must not look like writing: a store that rests tidies up.
            if refused is None or len(decision.kill) or len(decision.remember) or len(decision.relabel):
                at = self._moved_by(batch, None if gaps else decision.kill)
                left = None if gaps else self._left(at, places[at])
                table.carry_out(decision, batch, hashes, entries, places)
                if len(at):
                    table.note_moved(batch.topic_partitions[at], batch.offsets[at])
                table.publish(stamp if refused is None else None)
        if refused is not None:
            raise refused
        missing = tuple(decision.missing.tolist())
        return Applied(len(decision.insert), len(decision.kill), decision.foreign, missing, left)

    def note_moved(self, below: Mapping[int, int]) -> None:
        """Any record below these offsets may have taken a row away from here (`View.moved`).

        So it is when a part of a snapshot has been read: parts are written at different moments, and a row that changed
        its cell between them is in none until the log has been read again.
        """
        if below:
            with self._table.lock:
                self._table.note_moved(np.array(list(below)), np.array(list(below.values())) - 1)
                self._table.publish()

    def _moved_by(self, batch: Batch, killed: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
        """Of the batch's rows, or of those that `killed` one here, the ones whose ids live elsewhere now."""
        if killed is not None and not len(killed):
            return killed
        away = (batch.actions == _DROP) & (batch.cells != DELETED)
        return np.flatnonzero(away) if killed is None else killed[away[killed]]

    def _left(self, at: npt.NDArray[np.int64], places: npt.NDArray[np.int64]) -> tuple[Left, ...]:
        parts = self._table.parts
        return tuple(
            Left(at[positions], parts[serial].segment.vectors_of(rows_of(places[positions])))
            for serial, positions in by_segment(places)
        )

    def _check(self, batch: Batch) -> None:
        held = int(np.count_nonzero(batch.actions == _HOLD))
        if len(batch.vectors) != held or (held and batch.vectors.shape[1:] != (self.dim,)):
            raise ValueError(f"vectors have shape {batch.vectors.shape}: {held} rows to hold need ({held}, {self.dim})")
        if self.index.dtype == "float16" and held:
            largest = float(np.abs(batch.vectors).max())
            if largest > float(np.finfo(np.float16).max):
                raise ValueError(f"a vector has the number {largest:g}, too large for float16: use dtype float32")

    def forget(self, stable: Mapping[int, int]) -> None:
        """Drop remembered deletions below `stable`: offsets below which nothing older will be delivered any more.

        Not to be called while rows move between workers: a moved row carries an old version.
        """
        with self._table.lock:
            self._table.remembered.forget(stable, now=self._admission.full)

    def adopt(self, sealed: Sealed, marks: Marks) -> int:
        """Take over a sealed segment that was read from a snapshot, with its index; returns the rows that are new.

        Per id the highest version wins: rows that are known here in the same or a newer version, or remembered as
        deleted in a newer one, come in dead; older ones here die. Row by row the old and the new one change places at
        once; all rows are visible when this returns. The lock is taken for some thousand rows at a time.

        Parameters
        ----------
        sealed : Sealed
        marks : Marks
            Which of its rows are to be alive, and their cells.

        Raises
        ------
        StoreFull
            It would pass the memory limit; nothing has been changed.
        RecordError
            A column is of another kind here; nothing has been changed.
        """
        table = self._table
        with table.lock:
            self._admission.look(sum(sealed.nbytes().values()) + marks.nbytes + marks.live * PER_ID)
            table.begin_adopting(sealed, marks.cells)
        try:
            for rows in chunks(np.flatnonzero(marks.alive)):
                ids, hashes = sealed.ids.to_list(rows), sealed.ids.hashes(rows)
                with table.lock:
                    table.adopt(sealed, rows, hashes, ids)
                time.sleep(_PAUSE)
        finally:
            with table.lock:
                taken = table.end_adopting(sealed)
                table.publish()
        sealed.warn(self.index.recall_target)
        return taken

    @contextmanager
    def loading(self, size: int, *, stays: bool) -> Iterator[None]:
        """Count `size` bytes that are read from files as taken for the length of the block.

        Parameters
        ----------
        size : int
        stays : bool
            What is read is to be adopted: there must be room for it afterwards, too.

        Raises
        ------
        StoreFull
            There is no room.
        """
        with self._table.lock:
            self._admission.look(size if stays else 0)
        with self._budget.load(size):
            yield

    def drop_cells(self, keep: frozenset[int], at_most: int | None = None) -> int:
        """Remove the rows of all cells that are not in `keep`; returns how many.

        Takes 0.4 us for each: with `at_most` so many and no more, for a caller that others wait for meanwhile.
        """
        with self._table.lock:
            dropped = self._table.drop(np.fromiter(keep, dtype=np.int32, count=len(keep)), at_most)
            self._table.publish()
        return dropped

    def drop_strays(self, ids: Sequence[Id]) -> int:
        """Remove the rows of `ids` that a damaged store answers with beside, or without, those that it knows of; how
        many. See `headrace.gpu.strays`.
        """
        return drop_strays(self._table, ids, hash_ids(ids, self.ids))

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
        view: View | None = None,
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
            By default the index's own. A segment that was not seen to reach it is searched exactly.
        view : View, optional
            A moment of this store that the caller has kept; by default the current one.

        Raises
        ------
        ConfigError
            `k` is below 1, or `recall_target` is not above 0 and at most 1.
        ValueError
            The queries have another shape.
        """
        target = self.index.recall_target if recall_target is None else recall_target
        asked: Any = k
        if isinstance(asked, bool) or not isinstance(asked, Integral) or asked < 1:
            raise ConfigError(f"k is {k!r}: ask for a whole number of rows, at least 1")
        if not 0 < target <= 1:
            raise ConfigError(f"recall_target is {target!r}: give a number above 0 and at most 1, such as 0.95")
        if np.ndim(queries) != 2 or np.shape(queries)[1] != self.dim:
            raise ValueError(f"queries have shape {np.shape(queries)}: give (q, {self.dim}), one row for each")
        self._asked.note(queries)
        return reading.search(view or self.view, self.backend, self.metric, queries, k, target, where, cells)

    def get(self, ids: Sequence[Id], *, vectors: bool = False) -> tuple[list[StoredRow | None], View]:
        """Rows by id, None where an id is not here; and the view of the moment they were read."""
        hashes = hash_ids(ids, self.ids)
        with self._table.lock:
            _, places, known = self._table.known(hashes, ids)
            view = self._table.view
            parts = {serial: part.view for serial, part in self._table.parts.items()}
        found: list[StoredRow | None] = [None] * len(ids)
        here = np.flatnonzero(known.live)
        for serial, positions in by_segment(places[here]):
            at = here[positions]
            rows = reading.rows_of_part(parts[serial], rows_of(places[at]), vectors=vectors)
            for position, row in zip(at.tolist(), rows, strict=True):
                found[position] = row
        return found, view

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
        return reading.cell_sizes(self.view, self.backend, where)

    def counted(
        self, where: Filter | None = None, *, ids: bool = False, view: View | None = None
    ) -> tuple[dict[int, int], npt.NDArray[np.uint64] | None, View]:
        """`cell_sizes`, with `ids` the hashes of the rows' ids too, and the view that both are of: by default the
        current one.
        """
        view = view or self.view
        sizes = reading.cell_sizes(view, self.backend, where)
        return sizes, reading.id_hashes(view, self.backend, where) if ids else None, view

    def digests(self) -> tuple[dict[int, tuple[int, int]], Mapping[int, int]]:
        """Per cell, rows and the order-free sum of `row_digests`, computed from the rows; and the view's stamp."""
        view = self.view
        return reading.digests(view), view.stamp

    def row_digests(self, cells: frozenset[int] | None = None, *, deep: bool = False) -> Iterator[DigestedRows]:
        """One 64-bit digest for each live row of one view, in chunks; see `headrace.gpu.digests`."""
        return digested(self.view, cells, deep=deep)

    def statistics(self) -> dict[str, Any]:
        """`headrace.gpu.usage.statistics`, and under ``memory`` the worker's budget.

        ``rewriting`` is how many segments are being sealed or merged now. ``memory`` has, in bytes, ``held`` by this
        store, by ``all`` stores of the worker, ``working`` (taken by sealing and merging), the ``limit`` or None; and
        whether the last rows, or deletions, were refused as ``full``.
        """
        with self._table.lock:
            told = usage.statistics(self._table, self.index.recall_target)
        held = sum(told["bytes"].values())
        budget = self._budget
        budget.holds(self._table, held)
        memory = {"held": held, "all": budget.held, "working": budget.working, "limit": budget.limit}
        return {**told, "rewriting": self._maintenance.rewriting, "memory": {**memory, "full": self._admission.full}}

    # -- in the background ---------------------------------------------------------------------------------------------

    def wants_maintenance(self) -> bool:
        """Is there a segment to seal or to merge? Cheap enough to ask after every apply.

        To be asked now and then while nothing is written, too: a store that rests becomes one segment.
        """
        return self._maintenance.wanted()

    def maintain(self, *, settle: bool = False) -> bool:
        """Rewrite the segments that the policy names into one sealed segment; False when there is nothing to do.

        Runs for seconds on the calling thread, which must not be an event loop. A second thread may call it meanwhile:
        it seals what waits for its index, and leaves merging to the first. Rows that die or change their cell meanwhile
        are carried over at the swap.

        Parameters
        ----------
        settle : bool
            Nothing more will be written for long: make everything one segment now.
        """
        return self._maintenance.run(settle=settle)
