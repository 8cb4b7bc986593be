"""A collection in memory: a log, copies that apply it each at its own pace, and clients of all levels.

It follows the rules of the real one (headers to all, a read covers all cells, answers that do not fit together are
asked for again), with the time counted in steps. `Model.faults` names rules that it breaks, to see that the checker
notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from headrace.pipeline.cuts import left_behind
from tests.history.events import Answer, Event, FinalState, History, Placement, Produced, Read, Stored, Verified
from tests.history.histories import CELLS, WORKERS

TOPIC_PARTITIONS = 2
DELETED = -1


class Record(NamedTuple):
    id: int
    cell: int
    sent: float


class Told(NamedTuple):
    """What one copy says."""

    rows: dict[int, Stored]
    applied: dict[int, int]
    moved: dict[int, int]


class Copy:
    """What one worker holds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: dict[int, Stored] = {}
        self.applied = dict.fromkeys(range(TOPIC_PARTITIONS), 0)
        self.moved: dict[int, int] = {}

    def apply(self, tp: int, record: Record) -> None:
        """The next record of a topic partition."""
        offset = self.applied[tp]
        self.applied[tp] = offset + 1
        gone = self.rows.pop(record.id, None)
        if record.cell != DELETED and self.name in CELLS[record.cell]:
            self.rows[record.id] = Stored(record.id, tp, offset, record.cell)
        elif record.cell != DELETED and gone is not None:
            self.moved[tp] = offset + 1

    def told(self) -> Told:
        return Told(dict(self.rows), dict(self.applied), dict(self.moved))


class Model:
    """Everything, and the history of it."""

    def __init__(self, faults: frozenset[str] = frozenset()) -> None:
        self.faults = faults
        self.log: dict[int, list[Record]] = {tp: [] for tp in range(TOPIC_PARTITIONS)}
        self.copies = {name: Copy(name) for name in WORKERS}
        self.sessions: dict[str, dict[int, int]] = {}
        self.events: list[Event] = []
        self._time = 0.0

    def tick(self) -> float:
        self._time += 1.0
        return self._time

    def write(self, client: str, id: int, cell: int) -> None:
        """A record that is acknowledged; cell `DELETED` deletes."""
        tp, sent = id % TOPIC_PARTITIONS, self.tick()
        offset = len(self.log[tp])
        self.log[tp].append(Record(id, cell, sent))
        self._knows(client, {tp: offset + 1})
        at = int(sent * 1000)
        self.events.append(Produced(id, tp, offset, at, cell == DELETED, "", self.tick(), sent, client))

    def apply(self, worker: str, tp: int, records: int) -> None:
        """A worker applies so many more records, or all that there are."""
        copy = self.copies[worker]
        for record in self.log[tp][copy.applied[tp] :][:records]:
            if record.cell == DELETED and "deletes get lost" in self.faults:
                copy.applied[tp] += 1
            else:
                copy.apply(tp, record)

    def read(self, client: str, level: str, asked: tuple[int, ...], order: int, between: Mapping[str, int]) -> None:
        """Ask two workers, which hold everything together; while they answer, others apply `between` records."""
        started = self.tick()
        required = self._required(client, level, started)
        workers = [WORKERS[order % 3], WORKERS[(order + 1) % 3]]
        while True:
            told = [self._ask(worker, required, between) for worker in workers]
            behind = left_behind([(one.applied, one.moved) for one in told])
            if not behind or "answers that do not fit" in self.faults:
                break
            required = _highest(required, behind)
        newest: dict[int, Stored] = {}
        for row in (row for one in told for row in one.rows.values()):
            if row.id not in newest or newest[row.id].offset < row.offset:
                newest[row.id] = row
        applied = {tp: min(one.applied[tp] for one in told) for tp in range(TOPIC_PARTITIONS)}
        if "claims the most" in self.faults:
            applied = _highest(*(one.applied for one in told))
        rows = (row for row in newest.values() if not asked or row.id in asked)
        results = tuple(Answer(row.id, row.topic_partition, row.offset) for row in rows)
        kind = "get" if asked else "scan"
        self.events.append(Read(kind, level, started, self.tick(), {}, applied, results, asked, client))
        self._knows(client, _highest(*(one.applied for one in told)))

    def finish(self) -> History:
        """Everything is applied and looked at."""
        for worker in WORKERS:
            for tp in self.log:
                self.apply(worker, tp, len(self.log[tp]))
        self.events.append(Placement(CELLS, 2))
        for copy in self.copies.values():
            rows = tuple(copy.rows.values())
            self.events.append(FinalState(copy.name, rows, dict(copy.applied), self.tick()))
        return History.of([*self.events, Verified(True)])

    def _ask(self, worker: str, required: Mapping[int, int], between: Mapping[str, int]) -> Told:
        copy = self.copies[worker]
        for tp, offset in required.items():
            self.apply(worker, tp, max(0, offset - copy.applied[tp]))
        told = copy.told()
        for other, records in between.items():
            for tp in self.log:
                self.apply(other, tp, records)
        return told

    def _required(self, client: str, level: str, now: float) -> dict[int, int]:
        if level == "eventual" or f"{level} does not wait" in self.faults:
            return {}
        if level == "session":
            return dict(self.sessions.get(client, {}))
        since = now - float(level.partition(":")[2] or 0.0) / 1e3
        return {tp: sum(record.sent < since for record in records) for tp, records in self.log.items()}

    def _knows(self, client: str, offsets: Mapping[int, int]) -> None:
        self.sessions[client] = _highest(self.sessions.get(client, {}), offsets)


def _highest(*several: Mapping[int, int]) -> dict[int, int]:
    return {tp: max(offsets.get(tp, 0) for offsets in several) for tp in range(TOPIC_PARTITIONS)}
