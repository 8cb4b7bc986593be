"""The checker must pass what is right and, above all, be able to fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.history.checker import INVARIANTS, LEVELS, check_all, check_freshness
from tests.history.events import (
    Answer,
    Committed,
    Event,
    FaultMark,
    FinalState,
    FirstVisible,
    History,
    Placement,
    Produced,
    Read,
    Stored,
    Verified,
    WatermarkSample,
)
from tests.history.histories import (
    CELLS,
    GOOD,
    SCRIPT,
    at,
    change,
    everywhere,
    final,
    invariants,
    only,
    read,
    replacing,
    simulate,
    without,
)

# topic partition 0 holds: put 2, delete 2, put 4; topic partition 1: put 1, put 1, put 3, refused 3, put 3
OLD = Stored(3, 1, 2, 0)
GAVE_UP = "ConsistencyTimeout: 3 of 4"
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
    "failed with an error that is no deadline": [*GOOD, Read("get", "strong", 9, 9.1, {}, None, (), error="Lost: w0")],
    "failed at a level that waits for nothing": [*GOOD, Read("get", "eventual", 9, 9.1, {}, None, (), error=GAVE_UP)],
    "history two records in one place": [*GOOD, Produced(5, 1, 1, 9000, acked_at=9.0, sent_at=9.0)],
    "history nothing to judge by": [e for e in GOOD if not isinstance(e, FinalState | Placement)],
}  # fmt: skip


def test_a_good_history_passes_and_was_judged() -> None:
    report = check_all(History.of(GOOD), required=[*INVARIANTS[:-2], *LEVELS])
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
