"""The checker must pass what is right and, above all, be able to fail."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.errors import ConsistencyTimeout
from tests.history.checker import INVARIANTS, check_all, check_freshness
from tests.history.events import (
    Answer,
    Committed,
    DeadLettered,
    Event,
    FaultMark,
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
from tests.history.recorder import Recorder, value_digest

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


# topic partition 0 holds: put 2, delete 2, put 4; topic partition 1: put 1, put 1, put 3, refused 3, put 3
OLD = Stored(3, 1, 2, 0)
MUTATIONS: dict[str, list[Event]] = {
    "I1 a row dropped from one copy": final(without(1)),
    "I1 a row dropped from every copy": everywhere(without(4)),
    "I1 a copy was never scanned": change(FinalState, lambda _: None, worker="w2"),
    "I1 too few copies of a cell": change(Placement, lambda _: Placement({**CELLS, 0: ("w0",)}, 2)),
    "I2 an older version on one copy": final(only(Stored(1, 1, 0, 1, "value 1"))),
    "I2 an older version on all copies": everywhere(lambda rows: tuple(OLD if r.id == 3 else r for r in rows)),
    "I2 another value": final(only(Stored(1, 1, 1, 1, "value 1"))),
    "I2 digests differ": [*GOOD, Verified(False, ("cell 1",))],
    "I3 versions of two ids swapped": final(only(Stored(1, 0, 2, 1), Stored(4, 1, 1, 1))),
    "I3 a deleted id on a copy": final(only(Stored(2, 0, 0, 2, "value 2")), "w2"),
    "I3 an id never produced": final(only(Stored(9, 0, 9, 0)), "w0"),
    "I3 a refused version": final(only(Stored(3, 1, 3, 0)), "w0"),
    "I3 one id twice on a copy": final(lambda rows: (*rows, rows[0])),
    "I3 one id in two cells": final(only(Stored(1, 1, 1, 0, "value 3"))),
    "I3 a row on a stray worker": final(only(Stored(1, 1, 1, 1, "value 3")), "w0"),
    "I3 one id twice in an answer": read(lambda rows: (*rows, rows[0])),
    "I3 a deleted id in an answer": read(only(Answer(2, 0, 0))),
    "I3 a deleted id in an answer without versions": read(only(Answer(2)), "bounded:100"),
    "I3 an unknown id in an answer without versions": read(only(Answer(9)), "bounded:100"),
    "I3 an answer before it was written": change(Read, replacing(started=6.9, finished=7.0), kind="get"),
    "I3 not asked for": change(Read, lambda r: dataclasses.replace(r, asked=r.asked[:-1]), kind="get"),
    "I4 slow for most": [e if not isinstance(e, FirstVisible) else at(e.time + 0.1)(e) for e in GOOD],
    "I4 slow for the slowest": change(FirstVisible, at(9.0)),
    "I4 before it was written": change(FirstVisible, at(7.5)),
    "I5 an older version than claimed": read(only(Answer(1, 1, 0))),
    "I5 an id missing from an answer": read(without(4)),
    "I5 an id missing from an exhaustive search": read(without(4), "bounded:100"),
    "I5 a watermark fell": change(WatermarkSample, replacing(offsets={0: 3, 1: 4})),
    "I5 a watermark lost a topic partition": change(WatermarkSample, replacing(offsets={1: 5})),
    "I5 the last watermark fell": change(FinalState, replacing(watermarks={0: 3, 1: 4})),
    "I5 committed fell": change(Committed, replacing(offsets={0: 2, 1: 5})),
    "I5 committed past the unapplied": change(Committed, replacing(offsets={0: 3, 1: 5}), which=-2),
    "I5 a copy shows less than it reported": [
        *GOOD, Read("get", "eventual", 9.0, 9.1, {}, None, (Answer(1, 1, 0),), (1,), worker="w1")
    ],
    "promise a session read misses its own write": read(only(Answer(3, 1, 2)), "session"),
    "promise a session read misses its own id": read(without(4), "session"),
    "promise a session read shows what it deleted": read(only(Answer(2, 0, 0)), "session"),
    "promise a strong read had applied too little": change(Read, replacing(applied={0: 3}), consistency="strong"),
    "promise required offsets were not applied": change(Read, replacing(required={0: 4}), consistency="strong"),
    "history two records in one place": [*GOOD, Produced(5, 1, 1, 9000, acked_at=9.0, sent_at=9.0)],
    "history nothing to judge by": [e for e in GOOD if not isinstance(e, FinalState | Placement)],
}  # fmt: skip


def test_a_good_history_passes_and_was_judged() -> None:
    report = check_all(History.of(GOOD), required=INVARIANTS[:-1])
    assert report.ok, str(report)
    assert all(report.judged.values())


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(name: str) -> None:
    report = check_all(History.of(MUTATIONS[name]))
    assert name.split()[0] in {violation.invariant for violation in report.violations}, str(report)


def test_every_invariant_is_mutated_at_least_twice() -> None:
    names = [name.split()[0] for name in MUTATIONS]
    assert all(names.count(invariant) >= 2 for invariant in INVARIANTS)


def test_the_report_names_seed_and_command_and_is_short() -> None:
    text = str(check_all(History.of(everywhere(lambda _: ())), shown=2))
    assert "seed 7; run again: pytest -k this" in text
    assert len(text.splitlines()) == 5
    assert "more" in text


# what is uncertain is allowed either way


def test_a_read_during_a_write_may_show_either_version() -> None:
    early = Read("get", "session", 2.9, 3.01, {}, {0: 1, 1: 1}, (Answer(1, 1, 0),), (1,), "c")
    late = dataclasses.replace(early, results=(Answer(1, 1, 1),))
    assert not invariants([*GOOD, early, late])


def test_a_read_during_a_delete_may_or_may_not_show_it() -> None:
    shown = Read("get", "eventual", 3.9, 4.01, {}, {0: 1}, (Answer(2, 0, 0),), (2,))
    assert not invariants([*GOOD, shown, dataclasses.replace(shown, results=())])
    assert "I3" in invariants([*GOOD, dataclasses.replace(shown, applied={0: 2})])


@pytest.mark.parametrize("there", [True, False])
def test_an_unacknowledged_write_or_delete_may_have_happened(there: bool) -> None:
    put = Produced(6, None, None, 0, sent_at=8.5)
    delete = Produced(1, None, None, 0, deleted=True, sent_at=8.5)
    events = [*GOOD[:-5], put, delete, *GOOD[-5:]]
    if there:
        for i, e in enumerate(events):
            if isinstance(e, FinalState):
                rows = without(1)(e.rows) + ((Stored(6, 0, 3, 0),) if e.worker in CELLS[0] else ())
                events[i] = dataclasses.replace(e, rows=rows)
    assert not invariants(events)


def test_an_unacknowledged_write_on_one_copy_alone_is_caught() -> None:
    put = Produced(6, None, None, 8500, sent_at=8.5)
    assert "I2" in invariants([put, *final(lambda rows: (*rows, Stored(6, 0, 3, 0)), "w0")])


def test_copies_that_took_an_unacknowledged_version_apart_are_caught() -> None:
    known = Produced(1, 1, 5, 8500, sent_at=8.5)  # its place is known, its acknowledgement never came
    assert not invariants([known, *GOOD])
    assert not invariants(
        [known, *everywhere(lambda rows: tuple(r._replace(offset=5, digest="") if r.id == 1 else r for r in rows))]
    )
    assert invariants([known, *final(only(Stored(1, 1, 5, 1)))]) == {"I2"}


def test_an_unacknowledged_version_below_an_acknowledged_one_is_stale() -> None:
    unsure, newer = Produced(1, None, None, 8500, sent_at=8.5), Produced(1, 1, 6, 8600, acked_at=8.7, sent_at=8.6)
    rows = everywhere(lambda rows: tuple(r._replace(offset=5) if r.id == 1 else r for r in rows))
    assert not invariants([unsure, *rows])
    assert invariants([unsure, newer, *rows]) == {"I2"}


def test_offsets_decide_whatever_the_timestamps_and_the_order_of_noting() -> None:
    backwards = [
        dataclasses.replace(e, timestamp_ms=9000 - e.timestamp_ms) if isinstance(e, Produced) else e for e in GOOD
    ]
    assert not invariants(backwards[::-1], freshness_ms=None, required=())
    older = everywhere(lambda rows: tuple(OLD if r.id == 3 else r for r in rows))
    stale = [dataclasses.replace(e, timestamp_ms=0) if isinstance(e, Produced) else e for e in older]
    assert "I2" in invariants([e for e in stale if not isinstance(e, FirstVisible)])


def test_the_last_of_several_quiet_moments_is_judged() -> None:
    first = simulate(SCRIPT[:5])[-5:]
    gone = replacing(worker="a worker since gone")(first[1])
    assert not invariants([*first, gone, *GOOD])


def test_absence_says_nothing_on_one_copy_alone() -> None:
    assert not invariants([*GOOD, Read("get", "strong", 9.0, 9.1, {}, None, (), (1,), worker="w0")])


def test_a_copy_outside_the_placement_may_lag_and_a_new_incarnation_may_begin_lower() -> None:
    lag = WatermarkSample(8.3, "w0", {0: 0}, incarnation="second", active=False)
    assert not invariants([*GOOD, lag])
    assert "I5" in invariants([*GOOD, dataclasses.replace(lag, active=True)])  # it serves below what was committed
    assert "I5" in invariants([*GOOD, dataclasses.replace(lag, incarnation="")])


def test_samples_taken_at_once_prove_no_order() -> None:
    crossing = WatermarkSample(8.25, "w0", {0: 3, 1: 4}, started=8.05)
    assert not invariants([*GOOD, crossing, Committed(8.3, {0: 3, 1: 4}, started=8.05)])


def test_without_a_placement_copies_are_counted() -> None:
    inferred = [e if not isinstance(e, Placement) else Placement({}, 2) for e in GOOD]
    assert not invariants(inferred)
    emptied = [replacing(rows=())(e) if isinstance(e, FinalState) and e.worker == "w2" else e for e in inferred]
    assert "I1" in invariants(emptied)


def test_an_id_in_two_topic_partitions_is_decided_by_timestamp() -> None:
    other = Produced(1, 0, 3, 500, acked_at=8.9, sent_at=8.8)  # the higher offset, but the older timestamp
    assert not invariants([*GOOD, other])
    tie = dataclasses.replace(other, timestamp_ms=3000)
    taken = everywhere(lambda rows: tuple(Stored(1, 0, 3, 1) if r.id == 1 else r for r in rows))
    assert not invariants([*GOOD, tie]) | invariants([*taken, tie])  # either may stand
    assert "I2" in invariants([*GOOD, dataclasses.replace(other, timestamp_ms=8900)])


def test_freshness_within_a_fault_is_reported_apart() -> None:
    slow = change(FirstVisible, at(9.0))
    marked = [*slow, FaultMark(7.5, "kill"), FaultMark(8.5, "kill", healed=True)]
    assert not invariants(marked)
    found, figures = check_freshness(History.of(marked), fault_bound_ms=500)
    assert [v.invariant for v in found] == ["I4"]
    assert figures["fault_max"] == pytest.approx(1000)
    assert figures["fresh_max"] == pytest.approx(40)
    assert not invariants(slow, freshness_ms=None)


operations = st.tuples(st.sampled_from(["put", "put", "delete", "refused"]), st.integers(0, 5))
unsure = st.tuples(st.sampled_from(["put", "delete", "refused", "unsure", "unsent"]), st.integers(0, 5))


@given(st.lists(unsure, min_size=1, max_size=25))
def test_whatever_a_right_store_does_passes(script: list[tuple[str, int]]) -> None:
    report = check_all(History.of(simulate([("put", 0), *script])))
    assert report.ok, str(report)


CORRUPT: dict[str, Callable[[Stored], list[Stored]]] = {
    "drop": lambda row: [],
    "double": lambda row: [row, row],
    "older": lambda row: [row._replace(offset=row.offset - 1)],
    "newer": lambda row: [row._replace(offset=row.offset + 1)],
    "other id": lambda row: [row._replace(id=int(row.id) + 2)],
    "other value": lambda row: [row._replace(digest="wrong")],
    "other cell": lambda row: [row._replace(cell=(row.cell + 1) % 3)],
    "other topic partition": lambda row: [row._replace(topic_partition=1 - row.topic_partition)],
}


@given(st.lists(operations, max_size=25), st.integers(0, 5), st.sampled_from(sorted(CORRUPT)), st.booleans(), st.data())
def test_any_single_corruption_of_the_final_state_is_caught(
    script: list[tuple[str, int]], live: int, corruption: str, everywhere: bool, data: st.DataObject
) -> None:
    events = simulate([*script, ("put", live)])
    states = [(i, e) for i, e in enumerate(events) if isinstance(e, FinalState)]
    victim = data.draw(st.sampled_from(sorted({row for _, state in states for row in state.rows})))
    holders = [(i, state) for i, state in states if victim in state.rows]
    for i, state in holders if everywhere else [data.draw(st.sampled_from(holders))]:
        rows = [new for row in state.rows for new in (CORRUPT[corruption](row) if row == victim else [row])]
        events[i] = dataclasses.replace(state, rows=tuple(rows))
    assert invariants(events)


def test_a_history_file_says_the_same(tmp_path: Any) -> None:
    extra: list[Event] = [
        FaultMark(1.0, "kill"),
        Read("get", "eventual", 1, 2, {}, None, (), error="lost"),
        FinalState("x", (), {}),
    ]
    history = History.of([*GOOD, *extra, Produced("text id", None, None, 0)])
    history.save(tmp_path / "h.jsonl")
    assert History.load(tmp_path / "h.jsonl").events == history.events
    (tmp_path / "h.jsonl").write_text('{"event": "Origin"}\n{"event": "Nonsense"}\n')
    with pytest.raises(ValueError, match="line 2"):
        History.load(tmp_path / "h.jsonl")


class Dictionary:
    """A right collection in one dictionary, with the calls of a Collection."""

    def __init__(self) -> None:
        self.rows: dict[int, Any] = {}
        self.end, self.lock = 0, threading.Lock()

    def upsert(self, rows: list[dict[str, Any]], **_: Any) -> Any:
        acks = []
        with self.lock:
            for row in rows:
                attributes = {**{k: v for k, v in row.items() if k != "id"}, "absent": None}
                self.rows[row["id"]] = SimpleNamespace(
                    id=row["id"], topic_partition=0, offset=self.end, cell=0, score=1.0, attributes=attributes
                )
                acks.append((row["id"], 0, self.end))
                self.end += 1
        return SimpleNamespace(acks=tuple(acks))

    def delete(self, ids: list[int], **_: Any) -> Any:
        with self.lock:
            acks = tuple((id, 0, self.end + i) for i, id in enumerate(ids))
            self.end += len(ids)
            for id in ids:
                self.rows.pop(id, None)
        return SimpleNamespace(acks=acks)

    def get(self, ids: list[int], **options: Any) -> Any:
        if options.get("deadline") == 0:
            raise ConsistencyTimeout("offset 5 of topic partition 0 was missing")
        return [self.rows.get(id) for id in ids]

    def search(self, query: str | list[str], **_: Any) -> Any:
        return [self.rows_now()] * len(query) if isinstance(query, list) else self.rows_now()

    def rows_now(self) -> Any:
        class Hits(list[Any]):
            offsets: dict[int, int]

        with self.lock:
            hits = Hits(self.rows.values())
            hits.offsets = {0: self.end}
        return hits

    def scan(self, worker: str = "") -> Any:
        return list(self.rows.values())

    def status(self) -> dict[str, Any]:
        return {"workers": [{"address": "w", "watermarks": {0: self.end}, "state": "active"}]}

    def verify(self) -> Any:
        return SimpleNamespace(ok=True, differences=[])


def test_the_recorder_notes_a_run_of_several_threads(tmp_path: Any) -> None:
    recorder, store = Recorder(seed=3, command="pytest here"), Dictionary()

    def client(name: int) -> None:
        mine = recorder.wrap(store, f"client {name}")
        for turn in range(10):
            mine.upsert([{"id": name, "price": turn}, {"id": name, "price": turn + 0.5}], wait="searchable")
            mine.get([name, 99])
            mine.search(["a", "b"], exhaustive=True)
            if turn % 3 == 0:
                mine.delete([name])

    threads = [threading.Thread(target=client, args=(name,)) for name in range(3)]
    with recorder.sampling(store, lambda: {0: 0}, every=0.001), recorder.fault("nothing"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    recorder.sample(store, lambda: {0: store.end})
    with pytest.raises(ConsistencyTimeout):
        recorder.wrap(store).get([1], deadline=0)
    recorder.wrap(store, "last").upsert([{"id": 50, "price": 1}])
    recorder.final_state(store, replicas=1)
    recorder.save(tmp_path / "run.jsonl")
    report = check_all(History.load(tmp_path / "run.jsonl"))
    assert report.ok, str(report)
    assert report.figures["failed_reads"] == 1
    assert report.figures["fault_count"] == 60
    store.rows[50].attributes["price"] = 2
    recorder.final_state(store, replicas=1)
    store.rows.pop(50)
    recorder.wrap(store, "last").get([50])
    assert {v.invariant for v in check_all(recorder.history()).violations} == {"I2", "promise"}


def test_a_write_that_failed_is_noted_as_unsure() -> None:
    class Broken(Dictionary):
        def upsert(self, rows: list[dict[str, Any]], **options: Any) -> Any:
            super().upsert(rows[:1])
            raise ConsistencyTimeout("no answer")

    recorder, store = Recorder(), Broken()
    with pytest.raises(ConsistencyTimeout):
        recorder.wrap(store).upsert([{"id": 1}, {"id": 2}])
    assert [e.acked_at for e in recorder.history().events if isinstance(e, Produced)] == [None, None]
    recorder.final_state(store)
    assert check_all(recorder.history()).ok is False  # nothing is known to be there: not enough to judge by
    assert not invariants(list(recorder.history().events), required=())


def test_a_value_digest_ignores_what_storage_may_change() -> None:
    assert value_digest({"id": 1, "a": 1, "b": None, "vector": [1]}) == value_digest({"a": 1.0, "c": float("nan")})
    assert len({value_digest({"a": value}) for value in (1, True, "1", 2)}) == 4
