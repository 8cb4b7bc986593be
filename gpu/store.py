"""A worker's rows of one collection: apply versions, search, and never show anything in between.

One lock guards writing. Every change ends by publishing a new `View`, an immutable picture of all segments together
with the caller's stamp (the watermarks); searches take the current view and need no lock, so they block nobody and
nothing blinks: an upsert's old and new row change places in one assignment.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.backend import Array, Backend
from headrace.gpu.merge import MergePolicy, SegmentSize, plan
from headrace.gpu.rows import Action, Batch, Id, row_hash
from headrace.gpu.segments import Growing, Sealed, Segment, SegmentView, take

__all__ = ["Applied", "Found", "Store", "StoreSettings", "StoredRow", "View"]

log = logging.getLogger("headrace.gpu")

_ROW_BITS = 40
_ROW_MASK = (1 << _ROW_BITS) - 1


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """How a store keeps its rows.

    Attributes
    ----------
    seal_rows : int
        Rows after which the growing segment is frozen and indexed. An exact scan over 16,384 rows of 384 floats reads
        25 MB, about what a graph search of a hundred times more rows costs in time, and spares building many small
        graphs.
    graph_degree, graph_effort : int
        Of the index build (HNSW's M and efConstruction).
    search_effort : int
        efSearch / itopk_size; raised to k where k is larger.
    build_threads : int
        Threads that an index build may use.
    """

    seal_rows: int = 16_384
    graph_degree: int = 32
    graph_effort: int = 100
    search_effort: int = 128
    build_threads: int = 1
    merge: MergePolicy = field(default_factory=MergePolicy)


@dataclass(frozen=True, slots=True)
class View:
    """One moment of a store.

    Attributes
    ----------
    segments : tuple of SegmentView
    stamp : mapping of int to int
        What the writer said it had applied: topic partition to first offset not applied yet.
    rows : int
        Live rows.
    """

    segments: tuple[SegmentView, ...]
    stamp: Mapping[int, int]
    rows: int


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply did.

    Attributes
    ----------
    inserted, removed : int
        Rows; one that was replaced counts as both.
    foreign : int
        Records decided by timestamp, because their id was known from another topic partition.
    missing : tuple of int
        Positions in the batch of the rows to send again with their vectors.
    """

    inserted: int
    removed: int
    foreign: int
    missing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StoredRow:
    id: Id
    topic_partition: int
    offset: int
    timestamp: int
    cell: int
    attributes: dict[str, Any]
    vector: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a batch of queries: for each, rows best first and their scores; and the view's stamp."""

    rows: list[list[StoredRow]]
    scores: list[list[float]]
    stamp: Mapping[int, int]


class Store:
    """Rows of one collection on one worker.

    Parameters
    ----------
    backend : Backend
    dim : int
    metric : {"cosine", "ip", "l2"}
        For cosine, vectors and queries are handed in normalised.
    settings : StoreSettings, optional

    Notes
    -----
    Thread-safe. `apply`, `forget`, `drop_cells` take the lock for the length of one batch; `search`, `scan`, `digests`
    work on a view without it; `maintain` builds indexes outside the lock and swaps them in under it.
    """

    def __init__(self, backend: Backend, dim: int, metric: str, settings: StoreSettings | None = None) -> None:
        self.dim, self.metric = dim, metric
        self._backend, self._settings = backend, settings or StoreSettings()
        self._lock = threading.Lock()
        self._maintaining = threading.Lock()
        self._where: dict[Id, int] = {}
        self._gone: dict[Id, tuple[int, int, int]] = {}
        self._gone_limit = 4096
        self._growing = Growing(backend, dim, metric)
        self._frozen: set[int] = set()
        self._parts: dict[int, SegmentView] = {self._growing.serial: _empty_view(self._growing)}
        self._stamp: Mapping[int, int] = MappingProxyType({})
        self._view = View((), self._stamp, 0)

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
            There is not one vector of `dim` numbers for each row to hold; nothing has been changed.
        """
        held = int(np.count_nonzero(batch.actions == Action.HOLD))
        if len(batch.vectors) != held or (held and batch.vectors.shape[1:] != (self.dim,)):
            raise ValueError(f"vectors have shape {batch.vectors.shape}: {held} rows to hold need ({held}, {self.dim})")
        actions = batch.actions.tolist()
        offsets, partitions = batch.offsets.tolist(), batch.topic_partitions.tolist()
        timestamps = batch.timestamps.tolist()
        cells = batch.cells.tolist()
        vector_at = np.cumsum(batch.actions == Action.HOLD) - 1
        insert: dict[Id, int] = {}
        kill: dict[int, list[int]] = {}
        relabel: dict[int, list[tuple[int, int]]] = {}
        missing: list[int] = []
        foreign = 0
        with self._lock:
            for at, row_id in enumerate(batch.ids):
                version = partitions[at], offsets[at], timestamps[at]
                place = self._where.get(row_id)
                if place is None:
                    known = self._gone.get(row_id)
                else:
                    known = self._parts[place >> _ROW_BITS].segment.version(place & _ROW_MASK)
                order = 1
                if known is not None:
                    order, crossed = _compare(version, known)
                    foreign += crossed
                action = actions[at]
                if order < 0:
                    continue
                if order == 0 and place is not None and action != Action.DROP:
                    relabel.setdefault(place >> _ROW_BITS, []).append((place & _ROW_MASK, cells[at]))
                    continue
                if action == Action.KEEP:
                    missing.append(at)
                    continue
                if place is not None:
                    kill.setdefault(place >> _ROW_BITS, []).append(place & _ROW_MASK)
                    del self._where[row_id]
                if action == Action.HOLD:
                    self._gone.pop(row_id, None)
                    insert[row_id] = at
                else:
                    self._gone[row_id] = version
            for serial, changes in relabel.items():
                self._relabel(serial, changes)
            for serial, rows in kill.items():
                self._kill(serial, rows)
            if insert:
                self._insert(batch, list(insert.values()), vector_at)
            if stamp is not None:
                self._stamp = MappingProxyType(dict(stamp))
            self._publish()
        return Applied(len(insert), sum(map(len, kill.values())), foreign, tuple(missing))

    def forget(self, stable: Mapping[int, int]) -> None:
        """Drop remembered deletions below `stable`: offsets below which nothing older will be delivered any more.

        Not to be called while rows move between workers: a moved row carries an old version.
        """
        with self._lock:
            if len(self._gone) < self._gone_limit:
                return
            self._gone = {
                row_id: version for row_id, version in self._gone.items() if version[1] >= stable.get(version[0], 0)
            }
            self._gone_limit = max(4096, 2 * len(self._gone))

    def drop_cells(self, keep: frozenset[int]) -> int:
        """Remove the rows of all cells that are not in `keep`; returns how many."""
        wanted = np.fromiter(keep, dtype=np.int32, count=len(keep))
        dropped = 0
        with self._lock:
            for serial, part in list(self._parts.items()):
                rows = np.flatnonzero(part.alive & ~np.isin(part.cells, wanted))
                for row in rows.tolist():
                    row_id = part.segment.ids[row]
                    del self._where[row_id]
                    self._gone[row_id] = part.segment.version(row)
                if len(rows):
                    self._kill(serial, rows.tolist())
                    dropped += len(rows)
            self._publish()
        return dropped

    def stamp(self, stamp: Mapping[int, int]) -> None:
        """Publish a new stamp with no rows."""
        with self._lock:
            self._stamp = MappingProxyType(dict(stamp))
            self._publish()

    def _insert(self, batch: Batch, at: list[int], vector_at: npt.NDArray[np.int64]) -> None:
        held = vector_at[at]
        growing = self._growing
        first = growing.append(
            [batch.ids[row] for row in at],
            batch.topic_partitions[at],
            batch.offsets[at],
            batch.timestamps[at],
            batch.vectors[held],
            {name: [values[row] for row in held] for name, values in batch.attributes.items()},
        )
        for row, source in enumerate(at, first):
            self._where[batch.ids[source]] = growing.serial << _ROW_BITS | row
        part = self._parts[growing.serial]
        alive = np.concatenate([part.alive, np.ones(len(at), dtype=np.bool_)])
        self._parts[growing.serial] = SegmentView(growing, alive, np.concatenate([part.cells, batch.cells[at]]))
        if growing.count >= self._settings.seal_rows:
            self._frozen.add(growing.serial)
            self._growing = Growing(self._backend, self.dim, self.metric)
            self._parts[self._growing.serial] = _empty_view(self._growing)

    def _kill(self, serial: int, rows: list[int]) -> None:
        part = self._parts[serial]
        alive = part.alive.copy()
        alive[rows] = False
        self._parts[serial] = SegmentView(part.segment, alive, part.cells)

    def _relabel(self, serial: int, changes: list[tuple[int, int]]) -> None:
        part = self._parts[serial]
        cells = part.cells.copy()
        rows, numbers = zip(*changes, strict=True)
        cells[list(rows)] = numbers
        self._parts[serial] = SegmentView(part.segment, part.alive, cells)

    def _publish(self) -> None:
        self._view = View(tuple(self._parts.values()), self._stamp, len(self._where))

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def view(self) -> View:
        """The current moment. Cheap; never changes once taken."""
        return self._view

    def search(self, queries: npt.NDArray[np.float32], k: int) -> Found:
        """The `k` nearest live rows for each query, float32 (q, dim), over all segments of one view."""
        view = self._view
        k = min(k, max(1, view.rows))
        device = self._backend.xp.asarray(queries)
        parts = [part for part in view.segments if part.alive.any()]
        if not parts or not len(queries):
            return Found([[] for _ in queries], [[] for _ in queries], view.stamp)
        answers = [part.segment.search(part.alive, device, k, self._settings.search_effort) for part in parts]
        scores = np.concatenate([_to_host(score) for score, _ in answers], axis=1)
        rows = np.concatenate([_to_host(row) for _, row in answers], axis=1)
        owner = np.repeat(np.arange(len(parts)), [score.shape[1] for score, _ in answers])
        order = np.argsort(scores if self.metric == "l2" else -scores, axis=1, kind="stable")
        found: list[list[StoredRow]] = []
        best: list[list[float]] = []
        for query, ranked in enumerate(order):
            chosen = [at for at in ranked[: k + np.count_nonzero(rows[query] < 0)] if rows[query, at] >= 0][:k]
            found.append([_row(parts[owner[at]], int(rows[query, at])) for at in chosen])
            best.append([float(scores[query, at]) for at in chosen])
        return Found(found, best, view.stamp)

    def get(self, ids: Sequence[Id], *, vectors: bool = False) -> tuple[list[StoredRow | None], Mapping[int, int]]:
        """Rows by id, None where an id is not here; and the stamp of the moment they were read."""
        found: list[StoredRow | None] = []
        with self._lock:
            stamp = self._view.stamp
            places = [self._where.get(row_id) for row_id in ids]
            parts = dict(self._parts)
        for place in places:
            if place is None:
                found.append(None)
                continue
            found.append(_row(parts[place >> _ROW_BITS], place & _ROW_MASK, with_vector=vectors))
        return found, stamp

    def scan(
        self, cells: frozenset[int] | None = None, *, vectors: bool = False, batch: int = 1024
    ) -> Iterator[list[StoredRow]]:
        """Live rows of one view in chunks, optionally only of some cells."""
        for part in self._view.segments:
            wanted = part.alive
            if cells is not None:
                wanted = wanted & np.isin(part.cells, np.fromiter(cells, dtype=np.int32, count=len(cells)))
            rows = np.flatnonzero(wanted)
            for start in range(0, len(rows), batch):
                chunk = rows[start : start + batch]
                found = [_row(part, int(row)) for row in chunk]
                if vectors:
                    matrix = _to_host(part.segment.vectors_of(chunk))
                    found = [_with_vector(row, matrix[at]) for at, row in enumerate(found)]
                yield found

    def sample(self, rows: int, seed: int = 0) -> npt.NDArray[np.float32]:
        """At most `rows` vectors of live rows, drawn without replacement, float32 (n, dim)."""
        parts = [(part.segment, np.flatnonzero(part.alive)) for part in self._view.segments if part.alive.any()]
        if not parts:
            return np.empty((0, self.dim), dtype=np.float32)
        total = sum(len(live) for _, live in parts)
        share = min(1.0, rows / total)
        rng = np.random.default_rng(seed)
        drawn = [
            _to_host(segment.vectors_of(np.sort(rng.choice(live, max(1, int(len(live) * share)), replace=False))))
            for segment, live in parts
        ]
        return np.concatenate(drawn)[:rows]

    def cell_sizes(self) -> dict[int, int]:
        """Live rows by cell."""
        sizes: dict[int, int] = {}
        for part in self._view.segments:
            numbers, counts = np.unique(part.cells[part.alive], return_counts=True)
            for cell, count in zip(numbers.tolist(), counts.tolist(), strict=True):
                sizes[cell] = sizes.get(cell, 0) + count
        return sizes

    def digests(self) -> tuple[dict[int, tuple[int, int]], Mapping[int, int]]:
        """Per cell, rows and the order-free sum of `row_hash`, computed from the rows; and the view's stamp."""
        view = self._view
        sums: dict[int, tuple[int, int]] = {}
        for part in view.segments:
            segment = part.segment
            for row in np.flatnonzero(part.alive).tolist():
                cell = int(part.cells[row])
                count, total = sums.get(cell, (0, 0))
                value = row_hash(segment.ids[row], int(segment.topic_partitions[row]), int(segment.offsets[row]))
                sums[cell] = count + 1, (total + value) & 0xFFFF_FFFF_FFFF_FFFF
        return sums, view.stamp

    def statistics(self) -> dict[str, Any]:
        """Rows, segments, remembered deletions and bytes by purpose."""
        view = self._view
        purposes: dict[str, int] = {}
        segments = []
        for part in view.segments:
            kind = "sealed" if isinstance(part.segment, Sealed) else "growing"
            segments.append({"kind": kind, "rows": len(part.alive), "live": part.live})
            for purpose, size in part.segment.nbytes().items():
                purposes[purpose] = purposes.get(purpose, 0) + size
        return {"rows": view.rows, "segments": segments, "remembered": len(self._gone), "bytes": purposes}

    # -- in the background ---------------------------------------------------------------------------------------------

    def wants_maintenance(self) -> bool:
        """Is there a segment to seal or to merge? Cheap enough to ask after every apply."""
        return bool(self._frozen) or (len(self._view.segments) > 1 and bool(self._plan()[1]))

    def _plan(self) -> tuple[list[SegmentView], list[int]]:
        # Under the lock: an apply that freezes the growing segment while this looks would seem to end it too early.
        with self._lock:
            parts = [part for part in self._parts.values() if part.segment is not self._growing]
            frozen = set(self._frozen)
        sizes = [SegmentSize(len(part.alive), part.live, part.segment.serial in frozen) for part in parts]
        return parts, plan(sizes, self._settings.merge)

    def maintain(self) -> bool:
        """Rewrite the segments that the policy names into one sealed segment; False when there is nothing to do.

        Runs for seconds on the calling thread, which must not be an event loop; one run at a time. Rows that die or
        change their cell meanwhile are carried over at the swap.
        """
        with self._maintaining:
            parts, chosen = self._plan()
            if not chosen:
                return False
            old = [parts[position] for position in chosen]
            sources = [(part.segment, np.flatnonzero(part.alive)) for part in old]
            rows = sum(len(live) for _, live in sources)
            sealed = self._build(sources, rows) if rows else None
            with self._lock:
                self._swap(sources, sealed)
            log.debug("sealed %d rows of %d segments", rows, len(old))
            return True

    def _build(self, sources: list[tuple[Segment, npt.NDArray[np.int64]]], rows: int) -> Sealed:
        settings = self._settings
        sealed = Sealed(self._backend, rows)
        vectors = take(sources, self._backend, sealed)
        index = self._backend.graph.build(
            vectors,
            self.metric,
            degree=settings.graph_degree,
            effort=settings.graph_effort,
            threads=settings.build_threads,
        )
        sealed.adopt(index)
        return sealed

    def _swap(self, sources: list[tuple[Segment, npt.NDArray[np.int64]]], sealed: Sealed | None) -> None:
        now = [self._parts.pop(segment.serial) for segment, _ in sources]
        self._frozen.difference_update(segment.serial for segment, _ in sources)
        if sealed is not None:
            alive = np.concatenate([part.alive[rows] for part, (_, rows) in zip(now, sources, strict=True)])
            cells = np.concatenate([part.cells[rows] for part, (_, rows) in zip(now, sources, strict=True)])
            live = np.flatnonzero(alive)
            places = live | sealed.serial << _ROW_BITS
            self._where.update(zip(sealed.ids[live].tolist(), places.tolist(), strict=True))
            self._parts = {sealed.serial: SegmentView(sealed, alive, cells)} | self._parts
        self._publish()


def _empty_view(segment: Segment) -> SegmentView:
    return SegmentView(segment, np.empty(0, dtype=np.bool_), np.empty(0, dtype=np.int32))


def _compare(version: tuple[int, int, int], known: tuple[int, int, int]) -> tuple[int, bool]:
    """-1, 0, 1 as `version` is older, the same, newer; and whether two topic partitions met."""
    if version[0] == known[0]:
        return (version[1] > known[1]) - (version[1] < known[1]), False
    mine, theirs = (version[2], version[0]), (known[2], known[0])
    return (mine > theirs) - (mine < theirs), True


def _to_host(array: Array) -> npt.NDArray[Any]:
    """A CuPy array comes to the host; a NumPy array is itself."""
    return array.get() if hasattr(array, "get") else np.asarray(array)


def _row(part: SegmentView, row: int, *, with_vector: bool = False) -> StoredRow:
    segment = part.segment
    vector = _to_host(segment.vectors_of(np.array([row])))[0] if with_vector else None
    return StoredRow(segment.ids[row], *segment.version(row), int(part.cells[row]), segment.attributes_of(row), vector)


def _with_vector(row: StoredRow, vector: npt.NDArray[np.float32]) -> StoredRow:
    return StoredRow(row.id, row.topic_partition, row.offset, row.timestamp, row.cell, row.attributes, vector)
