"""The offline judge of a history: invariants I1 to I5, and what each read was promised.

==========  ================================================================================================
I1          nothing acknowledged is lost: every live id is on every copy of its cell, once quiet
I2          the last writer wins: the highest acknowledged version, with its value, and copies agree
I3          no ghosts: nothing never produced, deleted, refused, twice in one answer, or on a stray worker
I4          freshness: first visible minus Kafka's timestamp, p99, outside fault windows
I5          an honest watermark: answers show what their applied offsets claim; watermarks and commits only rise
promise     strong, session and bounded reads had applied, and show, what they had to wait for
history     the history contradicts itself, or holds nothing to judge an invariant by
==========  ================================================================================================

Only what is certain counts. A record without acknowledgement may exist or not. An answer may show more than it claims:
anything sent before it finished. A refused record is no write. For an id in several topic partitions the last version
of each is compared by Kafka's timestamp, and a tie allows either.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple

from tests.history.events import (
    Answer,
    Committed,
    DeadLettered,
    FaultMark,
    FinalState,
    FirstVisible,
    History,
    Id,
    Offsets,
    Origin,
    Placement,
    Produced,
    Read,
    Stored,
    Verified,
    WatermarkSample,
)

INVARIANTS = ("I1", "I2", "I3", "I4", "I5", "promise", "history")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise; `events` are positions in the history."""

    invariant: str
    message: str
    events: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found. `judged` says how much there was to judge each invariant by; `figures` are in ms and counts."""

    violations: tuple[Violation, ...]
    judged: Mapping[str, int]
    figures: Mapping[str, float] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    shown: int = 20

    @property
    def ok(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        counts = Counter(violation.invariant for violation in self.violations)
        verdict = ", ".join(f"{name}: {counts[name]}" for name in INVARIANTS if counts[name]) or "all invariants hold"
        lines = [f"{verdict} (judged {dict(self.judged)}, {dict(self.figures)})"]
        lines += [f"  {v.invariant} {v.message} [events {list(v.events)}]" for v in self.violations[: self.shown]]
        if len(self.violations) > self.shown:
            lines.append(f"  … and {len(self.violations) - self.shown} more")
        if self.violations:
            lines.append(f"  seed {self.origin.seed}; run again: {self.origin.command or '(no command was noted)'}")
        return "\n".join(lines)


class _Write(NamedTuple):
    at: int  # its position in the history
    record: Produced


class _Verdict(NamedTuple):
    invariant: str
    message: str
    events: tuple[int, ...]
    depends: bool = False  # on the offsets that the answer had to show


def _newer(a: Produced, b: Produced) -> bool:
    if a.topic_partition == b.topic_partition and a.offset is not None and b.offset is not None:
        return a.offset > b.offset
    return a.timestamp_ms >= b.timestamp_ms


def _highest(*bounds: Offsets) -> dict[int, int]:
    merged: dict[int, int] = {}
    for bound in bounds:
        for partition, offset in bound.items():
            merged[partition] = max(offset, merged.get(partition, 0))
    return merged


class _Rising:
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


class _Facts:
    """A history, arranged for questions."""

    def __init__(self, history: History) -> None:
        self.events = history.events
        self.dead = {(e.topic_partition, e.offset) for e in self.events if isinstance(e, DeadLettered)}
        self.broken: list[Violation] = []
        self.known: dict[tuple[int | None, int | None], _Write] = {}
        self.writes: dict[Id, list[_Write]] = defaultdict(list)
        self.sure: dict[Id, dict[int | None, tuple[list[int], list[_Write]]]] = {}
        for index, event in enumerate(self.events):
            if isinstance(event, Produced):
                self._take(_Write(index, event))
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

    def _take(self, write: _Write) -> None:
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

    def floor(self, id: Id, bound: Offsets | None) -> _Write | None:
        """The last certain write of an id below `bound` (None: of all)."""
        best: _Write | None = None
        for partition, (offsets, writes) in self.sure.get(id, {}).items():
            end = len(offsets) if bound is None else bisect_left(offsets, bound.get(partition or 0, 0))
            if end and (best is None or _newer(writes[end - 1].record, best.record)):
                best = writes[end - 1]
        return best

    def may_be(self, id: Id, *, deleted: bool, floor: _Write | None, until: float) -> bool:
        """Whether a write of this kind, not older than `floor`, can have been applied `until` then."""
        if floor is not None and floor.record.deleted == deleted:
            return True
        candidates = (w.record for w in self.writes.get(id, ()) if w.record.deleted == deleted)
        return any(
            record.sent_at <= until and (floor is None or record.offset is None or _newer(record, floor.record))
            for record in candidates
        )

    def verdict(self, row: Answer | Stored, floor: _Write | None, until: float) -> _Verdict | None:
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
                return _Verdict("I3", f"{id!r} has version {place}, which {why}", cited)
            if row.digest and seen.record.value_digest and row.digest != seen.record.value_digest:
                return _Verdict("I2", f"{id!r} at version {place} has another value than was written there", cited)
            stale = floor is not None and floor != seen and not _newer(seen.record, floor.record)
        else:
            sent = (w.record for w in self.writes.get(id, ()) if not w.record.deleted and w.record.sent_at <= until)
            # a version that nobody was told can only be that of a write whose place nobody was told
            if not any(row.offset is None or record.offset is None for record in sent):
                return _Verdict("I3", f"{id!r} at version {place} was never produced", cited)
            if row.offset is not None and floor is not None and floor.record.topic_partition == row.topic_partition:
                stale = row.offset < (floor.record.offset or 0)
            else:
                stale = not self.may_be(id, deleted=False, floor=floor, until=until)
        if stale and floor is not None:
            end = "deleted" if floor.record.deleted else "written again"
            newer = (floor.record.topic_partition, floor.record.offset)
            message = f"{id!r} has version {place} but was {end} at {newer}"
            return _Verdict("I3" if floor.record.deleted else "stale", message, cited, depends=True)
        return None

    def must_be(self, id: Id, floor: _Write | None, until: float) -> bool:
        return floor is not None and not self.may_be(id, deleted=True, floor=floor, until=until)

    @cached_property
    def final_violations(self) -> list[Violation]:
        return [*_final_rows(self), *_final_copies(self)]

    @cached_property
    def read_violations(self) -> list[Violation]:
        return list(_reads(self))


@lru_cache(maxsize=1)
def _facts(history: History) -> _Facts:
    return _Facts(history)


def _final_rows(facts: _Facts) -> Iterator[Violation]:
    for worker in sorted(facts.counted & facts.final.keys()):
        at, state = facts.final[worker]
        for id, times in Counter(row.id for row in state.rows).items():
            if times > 1:
                yield Violation("I3", f"{worker} holds {id!r} {times} times", (at,))
        for row in state.rows:
            if found := facts.verdict(row, facts.floor(row.id, None), state.time):
                invariant = "I2" if found.invariant == "stale" else found.invariant
                yield Violation(invariant, f"on {worker}: {found.message}", (at, *found.events))
            if worker not in facts.placement.cells.get(row.cell, (worker,)):
                yield Violation("I3", f"{worker} holds {row.id!r} of cell {row.cell}, which is placed elsewhere", (at,))
    for index, event in enumerate(facts.events):
        if isinstance(event, Verified) and not event.ok:
            yield Violation("I2", f"the digests of copies differ: {', '.join(event.differences)}", (index,))


def _final_copies(facts: _Facts) -> Iterator[Violation]:
    for worker in sorted(facts.counted - facts.final.keys()):
        yield Violation("I1", f"{worker} is in the placement but was not scanned")
    if not facts.final:
        return
    held: dict[Id, dict[str, Stored]] = defaultdict(dict)
    cells: dict[int, set[str]] = {cell: set(workers) for cell, workers in facts.placement.cells.items()}
    for worker in facts.counted & facts.final.keys():
        for row in facts.final[worker][1].rows:
            held[row.id][worker] = row
            if row.cell not in facts.placement.cells:
                cells.setdefault(row.cell, set()).add(worker)
    wanted = min(facts.placement.replicas or 0, len(facts.counted))
    for cell, workers in sorted(cells.items()):
        if len(workers) < wanted:
            yield Violation("I1", f"cell {cell} has {len(workers)} of {wanted} copies: {sorted(workers)}")
    for id in {**facts.sure, **held}:
        floor, rows = facts.floor(id, None), held.get(id, {})
        expected = facts.must_be(id, floor, math.inf)
        cited = (floor.at,) if floor else ()
        if expected and not rows:
            yield Violation("I1", f"{id!r} was acknowledged and is on no copy", cited)
        if len(homes := {row.cell for row in rows.values()}) > 1:
            yield Violation("I3", f"{id!r} is in cells {sorted(homes)} at once", cited)
        if len(versions := {(row.topic_partition, row.offset, row.digest) for row in rows.values()}) > 1:
            yield Violation("I2", f"copies hold {id!r} at different versions: {sorted(versions)}", cited)
        for worker in sorted({worker for cell in homes for worker in cells[cell]} & facts.final.keys() - rows.keys()):
            yield Violation("I1" if expected else "I2", f"{id!r} is missing from the copy on {worker}", cited)


def _reads(facts: _Facts) -> Iterator[Violation]:
    samples = [(i, e) for i, e in enumerate(facts.events) if isinstance(e, WatermarkSample)]
    reported = {key: _Rising((s.time, i, s.offsets) for i, s in samples if (s.worker, s.incarnation) == key)
                for key in {(s.worker, s.incarnation) for _, s in samples}}  # fmt: skip
    acked: dict[str, list[tuple[float, int, Offsets]]] = defaultdict(list)
    for (partition, offset), (index, record) in facts.known.items():
        if record.acked_at is not None and partition is not None and offset is not None:
            acked[f"client {record.client}"].append((record.acked_at, index, {partition: offset + 1}))
    acked["anybody"] = [note for notes in acked.values() for note in notes]
    promises = {who: _Rising(notes) for who, notes in acked.items()}
    for index, read in enumerate(facts.events):
        if not isinstance(read, Read) or read.error:
            continue
        what, _, limit = read.consistency.partition(":")
        who = f"client {read.client}" if what == "session" else "anybody"
        since = read.started - (float(limit) / 1000 if limit else 0.0)
        known = promises[who].offsets(since) if what != "eventual" and who in promises else {}
        promised = _highest(read.required, known)
        claimed = dict(read.applied or {})
        if read.applied is not None:
            short = {p: (claimed.get(p, 0), offset) for p, offset in promised.items() if claimed.get(p, 0) < offset}
            if short:
                missing = ", ".join(f"{p}: {got} of {offset}" for p, (got, offset) in sorted(short.items()))
                yield Violation(
                    "promise", f"a {read.consistency} read had not applied its offsets ({missing})", (index,)
                )
        if (key := (read.worker, read.incarnation)) in reported:
            claimed = _highest(claimed, reported[key].offsets(read.started))
        yield from _one_read(facts, index, read, claimed, _highest(claimed, promised))


def _one_read(facts: _Facts, index: int, read: Read, claimed: Offsets, bound: Offsets) -> Iterator[Violation]:
    asked = Counter(read.asked)
    returned = Counter(row.id for row in read.results)
    for id, times in returned.items():
        if times > max(1, asked[id]):
            yield Violation("I3", f"one answer holds {id!r} {times} times", (index,))
        if read.kind == "get" and id not in asked:
            yield Violation("I3", f"{id!r} was answered but not asked for", (index,))
    for row in read.results:
        if found := facts.verdict(row, facts.floor(row.id, bound), read.finished):
            # the answer's own claim is the graver breach; else it claimed little and broke what it was asked to show
            by_claim = not found.depends or facts.verdict(row, facts.floor(row.id, claimed), read.finished)
            invariant = "I5" if found.invariant == "stale" else found.invariant
            yield Violation(
                invariant if by_claim else "promise", f"{read.kind}: {found.message}", (index, *found.events)
            )
    # one copy alone holds only its cells, so only what it does show can be judged
    expected: Iterable[Id] = () if read.worker or read.kind == "search" else asked if read.kind == "get" else facts.sure
    for id in expected:
        floor = facts.floor(id, bound)
        if id not in returned and floor is not None and facts.must_be(id, floor, read.finished):
            invariant = "I5" if facts.must_be(id, facts.floor(id, claimed), read.finished) else "promise"
            place = (floor.record.topic_partition, floor.record.offset)
            yield Violation(invariant, f"{read.kind}: {id!r}, written at {place}, is missing", (index, floor.at))


_Seen = tuple[int, float, float, Offsets]  # event, started, finished, offsets


def _lower(earlier: Iterable[_Seen], later: Iterable[_Seen], message: str) -> Iterator[Violation]:
    """Where something asked for later was lower than what had been answered before."""
    before = _Rising((finished, index, offsets) for index, _, finished, offsets in earlier)
    for index, started, _, offsets in later:
        for partition, (high, at) in before.before(started).items():
            if (low := offsets.get(partition, 0)) < high:
                yield Violation("I5", f"topic partition {partition}: {message.format(low=low, high=high)}", (at, index))


def check_nothing_lost(history: History) -> list[Violation]:
    """I1: every live id is on every copy of its cell."""
    return [v for v in _facts(history).final_violations if v.invariant == "I1"]


def check_last_writer_wins(history: History) -> list[Violation]:
    """I2: the highest acknowledged version with its value, the same on every copy."""
    facts = _facts(history)
    return [v for v in facts.final_violations + facts.read_violations if v.invariant == "I2"]


def check_no_ghosts(history: History) -> list[Violation]:
    """I3: nothing unproduced, deleted, refused, doubled or stray, in answers and on copies."""
    facts = _facts(history)
    return [v for v in facts.final_violations + facts.read_violations if v.invariant == "I3"]


def check_promises(history: History) -> list[Violation]:
    """Strong, session and bounded reads had applied, and show, what they had to."""
    return [v for v in _facts(history).read_violations if v.invariant == "promise"]


def check_watermark_honest(history: History) -> list[Violation]:
    """I5: answers show what they claim; watermarks never fall; commits only rise and never pass an active copy.

    A watermark only rises, so a commit had passed an active copy if that copy's watermark is still lower *afterwards*.
    """
    facts = _facts(history)
    found = [v for v in facts.read_violations if v.invariant == "I5"]
    marks: dict[tuple[str, str], list[_Seen]] = defaultdict(list)
    active: list[tuple[str, _Seen]] = []
    commits: list[_Seen] = []
    for index, event in enumerate(facts.events):
        if isinstance(event, Committed):
            commits.append((index, event.time if event.started is None else event.started, event.time, event.offsets))
        elif isinstance(event, WatermarkSample):
            seen = (index, event.time if event.started is None else event.started, event.time, event.offsets)
            marks[event.worker, event.incarnation].append(seen)
            active += [(event.worker, seen)] if event.active else []
        elif isinstance(event, FinalState):
            seen = (index, event.time, event.time, event.watermarks)
            marks[event.worker, event.incarnation].append(seen)
            active += [(event.worker, seen)] if facts.final.get(event.worker) == (index, event) else []
    for (worker, _), seens in marks.items():
        found += _lower(seens, seens, f"the watermark of {worker} fell from {{high}} to {{low}}")
    found += _lower(commits, commits, "the committed offset fell from {high} to {low}")
    for worker in sorted({worker for worker, _ in active}):
        later = [seen for name, seen in active if name == worker]
        found += _lower(commits, later, f"{{high}} was committed while {worker} had applied only {{low}}")
    return found


def check_freshness(
    history: History, bound_ms: float = 100.0, *, settle: float = 0.0, fault_bound_ms: float | None = None
) -> tuple[list[Violation], dict[str, float]]:
    """I4: p99 of first visible minus Kafka's timestamp.

    Parameters
    ----------
    bound_ms : float
        For records that lived outside every fault window.
    settle : float
        Seconds by which a fault window outlasts its healing; a fault never healed lasts for ever.
    fault_bound_ms : float, optional
        For the slowest of the others.

    Returns
    -------
    violations, figures
        Figures in ms: p50, p99, max and count of the judged, and max and count within fault windows.
    """
    facts = _facts(history)
    windows: list[tuple[float, float]] = []
    marks = [event for event in facts.events if isinstance(event, FaultMark)]
    for mark in (mark for mark in marks if not mark.healed):
        healed = [m.time for m in marks if m.healed and m.what == mark.what and m.time >= mark.time]
        windows.append((mark.time, min(healed, default=math.inf) + settle))
    judged: list[tuple[float, int]] = []
    faulty: list[tuple[float, int]] = []
    found: list[Violation] = []
    for index, event in enumerate(facts.events):
        if not isinstance(event, FirstVisible):
            continue
        write = facts.known.get((event.topic_partition, event.offset))
        if write is None:
            place = (event.topic_partition, event.offset)
            found.append(Violation("I4", f"{place} was seen but never produced", (index,)))
            continue
        born = write.record.timestamp_ms / 1000
        late = (event.time - born) * 1000
        if late < -1.0:  # timestamps are whole milliseconds
            message = f"{write.record.id!r} was visible {-late:.0f} ms before Kafka's timestamp: a clock is off"
            found.append(Violation("I4", message, (index, write.at)))
        overlaps = any(begin <= event.time and born <= end for begin, end in windows)
        (faulty if overlaps else judged).append((late, index))
    judged.sort()
    figures = {"fresh_count": float(len(judged)), "fault_count": float(len(faulty))}
    if judged:
        p99, at = judged[math.ceil(0.99 * len(judged)) - 1]
        figures |= {"fresh_p50": judged[(len(judged) - 1) // 2][0], "fresh_p99": p99, "fresh_max": judged[-1][0]}
        if p99 > bound_ms:
            found.append(Violation("I4", f"p99 freshness is {p99:.1f} ms of {len(judged)}, over {bound_ms:g}", (at,)))
    if faulty:
        figures["fault_max"], at = max(faulty)
        if fault_bound_ms is not None and figures["fault_max"] > fault_bound_ms:
            found.append(Violation("I4", f"{figures['fault_max']:.1f} ms in a fault, over {fault_bound_ms:g}", (at,)))
    return found, figures


def check_all(
    history: History,
    *,
    freshness_ms: float | None = 100.0,
    settle: float = 0.0,
    fault_bound_ms: float | None = None,
    required: Collection[str] = ("I1", "I2", "I3"),
    shown: int = 20,
) -> Report:
    """Judge a history by everything.

    Parameters
    ----------
    freshness_ms, settle, fault_bound_ms
        As in `check_freshness`; None skips I4, for machines whose own stalls would be judged.
    required : collection of str
        Invariants that must have had something to be judged by; a history that proves nothing must not pass.
    shown : int
        At most so many violations in the text.
    """
    facts = _facts(history)
    found = [*facts.broken, *check_nothing_lost(history), *check_last_writer_wins(history), *check_no_ghosts(history)]
    kinds = Counter(type(event) for event in facts.events)
    figures: dict[str, float] = {}
    if freshness_ms is not None:
        slow, figures = check_freshness(history, freshness_ms, settle=settle, fault_bound_ms=fault_bound_ms)
        found += slow
    found += check_watermark_honest(history) + check_promises(history)
    reads = [event for event in facts.events if isinstance(event, Read)]
    figures |= {"reads": float(len(reads)), "failed_reads": float(sum(bool(read.error) for read in reads))}
    scanned = len(facts.counted & facts.final.keys()) if facts.known else 0
    judged = {
        "I1": scanned,
        "I2": scanned,
        "I3": scanned + sum(not read.error for read in reads),
        "I4": int(figures.get("fresh_count", 0)),
        "I5": kinds[WatermarkSample] + kinds[Committed] + sum(read.applied is not None for read in reads),
        "promise": sum(not read.error and read.consistency != "eventual" for read in reads),
    }
    found += [Violation("history", f"nothing to judge {name} by") for name in required if not judged[name]]
    origin = next((event for event in facts.events if isinstance(event, Origin)), Origin())
    return Report(tuple(found), judged, figures, origin, shown)
