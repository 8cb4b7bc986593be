"""A history, arranged for questions: which write of an id had to be seen, and what is wrong with a row that was."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from tests.history.events import (
    Answer,
    DeadLettered,
    FinalState,
    History,
    Id,
    Offsets,
    Placement,
    Produced,
    Stored,
)
from tests.history.report import Violation


class Write(NamedTuple):
    at: int  # its position in the history
    record: Produced


class Verdict(NamedTuple):
    invariant: str
    message: str
    events: tuple[int, ...]
    depends: bool = False  # on the offsets that the answer had to show


def newer(a: Produced, b: Produced) -> bool:
    if a.topic_partition == b.topic_partition and a.offset is not None and b.offset is not None:
        return a.offset > b.offset
    return a.timestamp_ms >= b.timestamp_ms


def highest(*bounds: Offsets) -> dict[int, int]:
    merged: dict[int, int] = {}
    for bound in bounds:
        for partition, offset in bound.items():
            merged[partition] = max(offset, merged.get(partition, 0))
    return merged


class Rising:
    """Offsets noted at times; asked for the highest noted strictly before one (the same moment proves no order)."""

    def __init__(self, noted: Iterable[tuple[float, int, Offsets]]) -> None:
        self._steps: dict[int, tuple[list[float], list[tuple[int, int]]]] = defaultdict(lambda: ([], []))
        for time, index, offsets in sorted(noted, key=lambda note: note[0]):
            for partition, offset in offsets.items():
                times, highest = self._steps[partition]
                times.append(time)
                highest.append(max((offset, index), highest[-1]) if highest else (offset, index))

    def before(self, time: float) -> dict[int, tuple[int, int]]:
        """Topic partition to (offset, index of the event that said so)."""
        found = ((partition, bisect_left(times, time), highest) for partition, (times, highest) in self._steps.items())
        return {partition: highest[position - 1] for partition, position, highest in found if position}

    def offsets(self, time: float) -> dict[int, int]:
        return {partition: offset for partition, (offset, _) in self.before(time).items()}


class Facts:
    """A history, arranged for questions."""

    def __init__(self, history: History) -> None:
        self.events = history.events
        self.dead = {(e.topic_partition, e.offset) for e in self.events if isinstance(e, DeadLettered)}
        self.broken: list[Violation] = []
        self.known: dict[tuple[int | None, int | None], Write] = {}
        self.writes: dict[Id, list[Write]] = defaultdict(list)
        self.sure: dict[Id, dict[int | None, tuple[list[int], list[Write]]]] = {}
        for index, event in enumerate(self.events):
            if isinstance(event, Produced):
                self._take(Write(index, event))
        for write in sorted(self.known.values(), key=lambda write: write.record.offset or 0):
            record = write.record
            if (place := (record.topic_partition, record.offset)) in self.dead or record.offset is None:
                continue
            self.writes[record.id].append(write)
            if record.acked_at is not None:
                offsets, writes = self.sure.setdefault(record.id, {}).setdefault(place[0], ([], []))
                offsets.append(record.offset)
                writes.append(write)
        placed = [(i, e) for i, e in enumerate(self.events) if isinstance(e, Placement)]
        scans = [(i, e) for i, e in enumerate(self.events) if isinstance(e, FinalState)]
        since, self.placement = placed[-1] if placed else (-1, Placement({}))
        # a run may be scanned at several quiet moments; the last placement begins the last of them
        self.final = {e.worker: (i, e) for i, e in [s for s in scans if s[0] > since] or scans}
        self.counted = {worker for workers in self.placement.cells.values() for worker in workers} or set(self.final)

    def _take(self, write: Write) -> None:
        record = write.record
        if record.offset is None:
            self.writes[record.id].append(write)
            return
        place = (record.topic_partition, record.offset)
        other = self.known.setdefault(place, write)
        if other.record.id != record.id or other.record.deleted != record.deleted:
            message = f"{record.id!r} and {other.record.id!r} were both acknowledged at {place}"
            self.broken.append(Violation("history", message, (other.at, write.at)))
        elif other.record.acked_at is None:
            self.known[place] = write

    def floor(self, id: Id, bound: Offsets | None) -> Write | None:
        """The last certain write of an id below `bound` (None: of all)."""
        best: Write | None = None
        for partition, (offsets, writes) in self.sure.get(id, {}).items():
            end = len(offsets) if bound is None else bisect_left(offsets, bound.get(partition or 0, 0))
            if end and (best is None or newer(writes[end - 1].record, best.record)):
                best = writes[end - 1]
        return best

    def may_be(self, id: Id, *, deleted: bool, floor: Write | None, until: float) -> bool:
        """Whether a write of this kind, not older than `floor`, can have been applied `until` then."""
        if floor is not None and floor.record.deleted == deleted:
            return True
        candidates = (w.record for w in self.writes.get(id, ()) if w.record.deleted == deleted)
        return any(
            record.sent_at <= until and (floor is None or record.offset is None or newer(record, floor.record))
            for record in candidates
        )

    def verdict(self, row: Answer | Stored, floor: Write | None, until: float) -> Verdict | None:
        """What is wrong with a row that was seen, when `floor` had to be seen."""
        id, place = row.id, (row.topic_partition, row.offset)
        seen = self.known.get(place)
        cited = tuple(write.at for write in (seen, floor) if write is not None)
        if seen is not None:
            reasons = {
                f"belongs to {seen.record.id!r}": seen.record.id != id,
                "is a delete": seen.record.deleted,
                "was refused": place in self.dead,
                "was not yet sent": seen.record.sent_at > until,
            }
            if why := next((reason for reason, holds in reasons.items() if holds), ""):
                return Verdict("I3", f"{id!r} has version {place}, which {why}", cited)
            if row.digest and seen.record.value_digest and row.digest != seen.record.value_digest:
                return Verdict("I2", f"{id!r} at version {place} has another value than was written there", cited)
            stale = floor is not None and floor != seen and not newer(seen.record, floor.record)
        else:
            sent = (w.record for w in self.writes.get(id, ()) if not w.record.deleted and w.record.sent_at <= until)
            # a version that nobody was told can only be that of a write whose place nobody was told
            if not any(row.offset is None or record.offset is None for record in sent):
                return Verdict("I3", f"{id!r} at version {place} was never produced", cited)
            if row.offset is not None and floor is not None and floor.record.topic_partition == row.topic_partition:
                stale = row.offset < (floor.record.offset or 0)
            else:
                stale = not self.may_be(id, deleted=False, floor=floor, until=until)
        if stale and floor is not None:
            end = "deleted" if floor.record.deleted else "written again"
            later = (floor.record.topic_partition, floor.record.offset)
            message = f"{id!r} has version {place} but was {end} at {later}"
            return Verdict("I3" if floor.record.deleted else "stale", message, cited, depends=True)
        return None

    def must_be(self, id: Id, floor: Write | None, until: float) -> bool:
        return floor is not None and not self.may_be(id, deleted=True, floor=floor, until=until)


@lru_cache(maxsize=1)
def facts_of(history: History) -> Facts:
    return Facts(history)
