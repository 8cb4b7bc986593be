"""Right histories, made by hand, and ways to spoil them: the checker must be able to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from tests.history.checker import check_all
from tests.history.events import (
    Answer,
    Committed,
    DeadLettered,
    Event,
    FinalState,
    FirstVisible,
    History,
    Origin,
    Placement,
    Produced,
    Read,
    Stored,
    Verified,
    WatermarkSample,
)

WORKERS = ("w0", "w1", "w2")
CELLS = {cell: (WORKERS[cell], WORKERS[(cell + 1) % 3]) for cell in range(3)}
E = TypeVar("E", bound=Event)


def simulate(script: list[tuple[str, int]]) -> list[Event]:
    """A right history: every operation takes a second, is applied everywhere, sampled, committed and read.

    Operations: "put", "delete", "refused" (dead letter), "unsure" (applied, never acknowledged), "unsent" (neither).
    """
    events: list[Event] = [Origin(seed=7, command="pytest -k this")]
    store: dict[int, Stored] = {}
    ends = {0: 0, 1: 0}
    for second, (what, id) in enumerate(script, 1):
        now, partition, offset = float(second), id % 2, ends[id % 2]
        place = (None, None) if what.startswith("uns") else (partition, offset)
        acked = None if what.startswith("uns") else now + 0.05
        digest = f"value {second}"
        events.append(Produced(id, place[0], place[1], second * 1000, what == "delete", digest, acked, now, "c"))
        if what == "delete":
            store.pop(id, None)
        elif what in ("put", "unsure"):
            store[id] = Stored(id, partition, offset, id % 3, digest)
        elif what == "refused":
            events.append(DeadLettered(partition, offset, "not a vector"))
        ends[partition] += what != "unsent"
        if what in ("put", "delete"):
            events.append(FirstVisible(partition, offset, now + 0.04))
        events.append(Committed(now + 0.1, dict(ends), now + 0.09))
        events += [WatermarkSample(now + 0.2, worker, dict(ends)) for worker in WORKERS]
        rows = tuple(Answer(r.id, r.topic_partition, r.offset, None, r.digest) for r in store.values())
        asked = tuple({id for _, id in script})
        events.append(Read("get", "strong", now + 0.3, now + 0.4, {}, dict(ends), rows, asked, "other"))
        events.append(Read("get", "session", now + 0.3, now + 0.4, {}, None, rows, asked, "c"))
        hits = tuple(Answer(r.id, score=0.5) for r in store.values())
        events.append(Read("scan", "bounded:100", now + 0.5, now + 0.6, {}, dict(ends), hits))
        events.append(Read("search", "strong", now + 0.7, now + 0.8, {}, dict(ends), rows[:1]))
        events.append(Read("scan", "eventual", now + 0.7, now + 0.8, {}, dict(ends), rows))
    end = len(script) + 1.0
    events.append(Placement(CELLS, 2))
    for worker in WORKERS:
        held = tuple(row for row in store.values() if worker in CELLS[row.cell])
        events.append(FinalState(worker, held, dict(ends), end))
    return [*events, Verified(True)]


SCRIPT = [("put", 1), ("put", 2), ("put", 1), ("delete", 2), ("put", 4), ("put", 3), ("refused", 3), ("put", 3)]
GOOD = simulate(SCRIPT)


def invariants(events: list[Event], **options: Any) -> set[str]:
    return {violation.invariant for violation in check_all(History.of(events), **options).violations}


def change(what: type[E], edit: Callable[[E], Event | None], *, which: int = -1, **where: Any) -> list[Event]:
    """The good history with one event of a kind edited, or left out."""
    at = [
        i for i, e in enumerate(GOOD) if isinstance(e, what) and all(getattr(e, k) == v for k, v in where.items())
    ][which]  # fmt: skip
    edited = edit(GOOD[at])  # type: ignore[arg-type]
    return [*GOOD[:at], *([] if edited is None else [edited]), *GOOD[at + 1 :]]


def final(edit: Callable[[tuple[Stored, ...]], tuple[Stored, ...]], worker: str = "w1") -> list[Event]:
    return change(FinalState, lambda state: dataclasses.replace(state, rows=edit(state.rows)), worker=worker)


def everywhere(edit: Callable[[tuple[Stored, ...]], tuple[Stored, ...]]) -> list[Event]:
    return [dataclasses.replace(e, rows=edit(e.rows)) if isinstance(e, FinalState) else e for e in GOOD]


def read(edit: Callable[[tuple[Answer, ...]], tuple[Answer, ...]], consistency: str = "strong") -> list[Event]:
    kind = "scan" if consistency.startswith("bounded") else "get"
    return change(Read, lambda r: dataclasses.replace(r, results=edit(r.results)), kind=kind, consistency=consistency)


def only(*rows: Any) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    """Replace the rows of the same ids."""
    return lambda old: (*(row for row in old if row.id not in {new.id for new in rows}), *rows)


def without(id: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
    return lambda rows: tuple(row for row in rows if row.id != id)


def at(second: float) -> Callable[[Any], Any]:
    return lambda event: dataclasses.replace(event, time=second)


def replacing(**fields: Any) -> Callable[[Any], Any]:
    return lambda event: dataclasses.replace(event, **fields)
