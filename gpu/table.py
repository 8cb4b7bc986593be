"""What changes in a store: its segments, who is where, and what was deleted, under one lock.

Every change ends by publishing a new `View`, an immutable picture of all segments together with the caller's stamp
(the watermarks). Readers take the current view and need no lock, so they block nobody and nothing blinks: an upsert's
old and new row change places in one assignment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from headrace.gpu.applying import Decision, Known, decide
from headrace.gpu.errors import RecordError
from headrace.gpu.marks import Marks
from headrace.gpu.places import Directory, Forwarding, by_segment, places_of, rows_of, serials_of, weakly
from headrace.gpu.remembered import REMEMBERED, Remembered
from headrace.gpu.rows import DELETED, Action, Batch, Id
from headrace.gpu.segments import Growing, Sealed, Segment, SegmentView, View
from headrace.gpu.versions import Versions

__all__ = ["Part", "Source", "Table", "forwarding"]

_Ints = npt.NDArray[np.int64]
_Hashes = npt.NDArray[np.uint64]


@dataclass(slots=True)
class Part:
    """A segment, its marks, and whether it is a growing one that is full, or one whose rows are still coming alive."""

    segment: Segment
    marks: Marks
    frozen: bool = False
    arriving: bool = False

    @property
    def view(self) -> SegmentView:
        return SegmentView(self.segment, self.marks.alive, self.marks.cells, self.marks.live)


Source = tuple[Segment, _Ints]
"""Rows of a segment that go into a new one."""


class Table:
    """The segments of one store. All methods but `view` are to be called with `lock` held.

    Parameters
    ----------
    begin : callable
        Makes a growing segment.
    seal_rows : int
        Rows at which it is full.
    ids : {"string", "integer"}
    """

    def __init__(self, begin: Callable[[], Growing], seal_rows: int, ids: str) -> None:
        self.lock = threading.Lock()
        self._begin, self._seal_rows = begin, seal_rows
        self.directory = Directory(weakly(self._same))
        self.remembered = Remembered(ids, self.directory)
        self.growing = begin()
        self.parts: dict[int, Part] = {self.growing.serial: Part(self.growing, Marks())}
        self._stamp: Mapping[int, int] = MappingProxyType({})
        self._moved: Mapping[int, int] = MappingProxyType({})
        self._view = View((), self._stamp, 0, self._moved)
        self.changed_at = time.monotonic()

    @property
    def view(self) -> View:
        """The current moment. Needs no lock."""
        return self._view

    def publish(self, stamp: Mapping[int, int] | None = None) -> None:
        """Make all changes visible in one assignment."""
        if stamp is not None:
            self._stamp = MappingProxyType(dict(stamp))
        segments = tuple(part.view for part in self.parts.values())
        self._view = View(segments, self._stamp, sum(segment.live for segment in segments), self._moved)

    def note_moved(self, topic_partitions: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> None:
        """Records that took rows from here to other workers; seen with the next `publish`."""
        moved = dict(self._moved)
        for tp, offset in zip(topic_partitions.tolist(), offsets.tolist(), strict=True):
            moved[tp] = max(offset + 1, moved.get(tp, 0))
        self._moved = MappingProxyType(moved)

    # -- looking up ----------------------------------------------------------------------------------------------------

    def known(self, hashes: _Hashes, ids: Sequence[Id]) -> tuple[_Ints, _Ints, Known]:
        """The directory's entries and the places of `ids` (-1 if unknown), and what is known there."""
        entries, places = self.directory.find(hashes, ids)
        versions = Versions.unknown(len(ids))
        heard = np.flatnonzero(places >= 0)
        if not len(heard):
            nothing = np.zeros(len(ids), dtype=np.bool_)
            return entries, places, Known(nothing, nothing, versions)
        for serial, positions in by_segment(places[heard]):
            at = heard[positions]
            versions.put(at, self._versions_of(serial, rows_of(places[at])))
        remembered = serials_of(places) == REMEMBERED
        return entries, places, Known((places >= 0) & ~remembered, remembered, versions)

    def cells_of(self, places: _Ints) -> npt.NDArray[np.int32]:
        """Cells of the rows at `places`; `DELETED` where there is no place, a remembered deletion, or a dead row."""
        cells = np.full(len(places), DELETED, dtype=np.int32)
        rows = np.flatnonzero((places >= 0) & (serials_of(places) != REMEMBERED))
        for serial, positions in by_segment(places[rows]):
            at = rows[positions]
            marks, numbers = self.parts[serial].marks, rows_of(places[at])
            cells[at] = np.where(marks.alive[numbers], marks.cells[numbers], DELETED)
        return cells

    def _versions_of(self, serial: int, rows: _Ints) -> Versions:
        if serial == REMEMBERED:
            return self.remembered.versions(rows)
        return self.parts[serial].segment.versions.take(rows)

    def _same(self, serial: int, rows: _Ints, ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
        column = self.remembered.ids if serial == REMEMBERED else self.parts[serial].segment.ids
        return column.same(rows, ids)

    # -- changing ------------------------------------------------------------------------------------------------------

    def carry_out(self, decision: Decision, batch: Batch, hashes: _Hashes, entries: _Ints, places: _Ints) -> None:
        """Do what was decided about a batch.

        Raises
        ------
        RecordError
            An attribute is not of its column's kind; nothing has been changed.
        """
        self.changed_at = time.monotonic()
        versions = Versions(batch.topic_partitions, batch.offsets, batch.timestamps)
        new = self._insert(decision, batch, hashes, versions) if len(decision.insert) else None
        for serial, positions in by_segment(places[decision.relabel]) if len(decision.relabel) else ():
            at = decision.relabel[positions]
            self.parts[serial].marks.relabel(rows_of(places[at]), batch.cells[at])
        for serial, positions in by_segment(places[decision.kill]) if len(decision.kill) else ():
            self.parts[serial].marks.kill(rows_of(places[decision.kill[positions]]))
        if len(decision.renew):
            self.remembered.renew(rows_of(places[decision.renew]), versions.take(decision.renew))
        if len(decision.remember):
            at = decision.remember
            gone = self.remembered.add([batch.ids[row] for row in at.tolist()], hashes[at], versions.take(at))
            self.directory.change(hashes[at], entries[at], gone)
        if new is not None:
            self.directory.change(hashes[decision.insert], entries[decision.insert], new)
        if len(decision.release):
            self.remembered.release(rows_of(places[decision.release]))

    def _insert(self, decision: Decision, batch: Batch, hashes: _Hashes, versions: Versions) -> _Ints:
        at, held = decision.insert, decision.vector_rows
        growing, attributes, ids, vectors = self.growing, batch.attributes, batch.ids, batch.vectors
        if len(at) < len(ids):
            ids = [ids[row] for row in at.tolist()]
        if len(held) < len(vectors):
            vectors = vectors[held]
            attributes = {name: [values[row] for row in held.tolist()] for name, values in attributes.items()}
        first = growing.append(ids, hashes[at], versions.take(at), vectors, attributes)
        part = self.parts[growing.serial]
        part.marks.append(batch.cells[at])
        if len(growing) >= self._seal_rows:
            self.freeze()
        return places_of(growing.serial, np.arange(first, first + len(at)))

    def freeze(self) -> None:
        """Write no more into the growing segment, and begin another."""
        self.parts[self.growing.serial].frozen = True
        self.growing = self._begin()
        self.parts[self.growing.serial] = Part(self.growing, Marks())

    def drop(self, wanted: npt.NDArray[np.int32], at_most: int | None = None) -> int:
        """Remove the rows of all cells but `wanted`, and remember their versions; returns how many."""
        self.directory.finish()
        dropped = 0
        for serial, part in self.parts.items():
            rows = np.flatnonzero(part.marks.alive & ~np.isin(part.marks.cells, wanted))
            rows = rows if at_most is None else rows[: at_most - dropped]
            if not len(rows):
                continue
            segment = part.segment
            hashes = segment.ids.hashes(rows)
            gone = self.remembered.add(segment.ids.to_list(rows), hashes, segment.versions.take(rows))
            self.directory.change(hashes, places_of(serial, rows), gone)
            part.marks.kill(rows)
            dropped += len(rows)
        return dropped

    def begin_adopting(self, sealed: Sealed, cells: npt.NDArray[np.int32]) -> None:
        """Take over a segment, with no row alive yet: `adopt` and `end_adopting` are to follow. None merges it so long.

        Raises
        ------
        RecordError
            A column is of another kind here; nothing has been changed.
        """
        theirs = sealed.columns.schema
        for name, kind in [pair for part in self.parts.values() for pair in part.segment.columns.schema.items()]:
            if (other := theirs.get(name, kind)) != kind:
                raise RecordError(f"attribute {name!r} is {other} in segment {sealed.uid}, here it is {kind}")
        marks = Marks(np.zeros(len(sealed), dtype=np.bool_), cells)
        self.parts = {sealed.serial: Part(sealed, marks, arriving=True)} | self.parts

    def adopt(self, sealed: Sealed, rows: _Ints, hashes: _Hashes, ids: Sequence[Id]) -> None:
        """Some rows come alive: those that are not known here in the same or a newer version.

        Decided as a batch that holds them is, except that rows which are here at the same version keep their cell.
        """
        self.changed_at = time.monotonic()
        marks, versions = self.parts[sealed.serial].marks, sealed.versions.take(rows)
        entries, places, known = self.known(hashes, ids)
        batch = Batch(
            ids,
            versions.topic_partitions,
            versions.offsets,
            versions.timestamps,
            marks.cells[rows],
            np.full(len(rows), int(Action.HOLD), dtype=np.uint8),
            np.empty((len(rows), 0), dtype=np.float32),
        )
        decision = decide(batch, known)
        taken = decision.insert
        for serial, positions in by_segment(places[decision.kill]):
            self.parts[serial].marks.kill(rows_of(places[decision.kill[positions]]))
        marks.revive(rows[taken])
        self.directory.change(hashes[taken], entries[taken], places_of(sealed.serial, rows[taken]))
        if len(decision.release):
            self.remembered.release(rows_of(places[decision.release]))

    def end_adopting(self, sealed: Sealed) -> int:
        """From now on it is a segment like others, or none if no row came alive; returns how many did."""
        part = self.parts[sealed.serial]
        part.arriving = False
        if not part.marks.live:
            del self.parts[sealed.serial]
        return part.marks.live

    def replace(self, sources: Sequence[Source], sealed: Sealed | None, way: Forwarding | None) -> None:
        """Put `sealed`, built from `sources`, in their place; rows that died or changed their cell meanwhile stay so.

        The directory is told of the new places and enters them step by step: see `Directory.step`.

        Parameters
        ----------
        sources : sequence of Source
            All rows of these segments that were alive when it was built, in its order.
        sealed : Sealed or None
            None where there was no such row.
        way : Forwarding or None
            From `forwarding`; None as `sealed`.
        """
        self.directory.finish()
        now = [self.parts.pop(segment.serial).marks for segment, _ in sources]
        if sealed is None or way is None:
            return
        marks = Marks(
            np.concatenate([marks.alive[rows] for marks, (_, rows) in zip(now, sources, strict=True)]),
            np.concatenate([marks.cells[rows] for marks, (_, rows) in zip(now, sources, strict=True)]),
        )
        self.directory.forward(way, lambda: marks.alive)
        self.parts = {sealed.serial: Part(sealed, marks)} | self.parts


def forwarding(sources: Sequence[Source], sealed: Sealed) -> Forwarding:
    """The way from the rows of `sources` to those of `sealed`, for `Table.replace`. Needs no lock."""
    old = np.concatenate([places_of(segment.serial, rows) for segment, rows in sources])
    return Forwarding(old, places_of(sealed.serial, np.arange(len(sealed))), sealed.ids.hashes())
