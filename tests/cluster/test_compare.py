"""Do the copies agree: judged from what they say, without a cluster; and what is told to whom to mend them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cluster.compare import Heard, differing_cells, judge, odd_digests
from headrace.cluster.correcting import batch_of, header_without_rows, no_longer_in_the_log, told
from headrace.cluster.fanout import Header
from headrace.cluster.state import CollectionSpec, CollectionState, first_codebook
from headrace.gpu.backend import resolve
from headrace.gpu.rows import DELETED, Action, Batch
from headrace.gpu.store import Store

A, B, C = "a", "b", "c"
ENDS = {0: 100}


def state_of(holders: tuple[str, ...] = (A, B)) -> CollectionState:
    return CollectionState(
        spec=CollectionSpec("docs", dim=2),
        codebook=first_codebook(2),
        epoch=3,
        members=dict.fromkeys((A, B, C), "active"),
        copies={0: holders, 1: (C, A)},
        serving={0: holders, 1: (C, A)},
    )


def at(offset: int, cell: int = 0) -> Heard:
    return Heard(0, offset, offset, cell)


def judged(a: Heard | None, b: Heard | None, c: Heard | None, marks: Any = (50, 50, 50), ends: Any = ENDS) -> Any:
    said = {A: a, B: b, C: c}
    return judge(said, {worker: {0: mark} for worker, mark in zip(said, marks, strict=True)}, ends, state_of())


class TestJudging:
    def test_copies_that_agree(self) -> None:
        gone = at(7, DELETED)
        for said in [(at(7), at(7), gone), (at(7), at(7), None), (gone, gone, gone), (None, gone, None), (None,) * 3]:
            answer = judged(*said)
            assert not answer.faults
            assert not answer.wait_for

    @pytest.mark.parametrize(
        ("said", "faults"),
        [
            ((at(7), None, None), {B: "lacks it"}),
            ((at(7), at(7, DELETED), None), {B: "lacks it"}),
            ((at(7), at(5), None), {B: "has topic partition 0 offset 5 instead of offset 7"}),
            ((at(7), at(9, DELETED), None), {A: "still has the row of topic partition 0 offset 7"}),
            ((at(7), at(7), at(7)), {C: "has a row too many, of topic partition 0 offset 7"}),
            ((at(7), at(7, 1), None), {B: "has the row in cell 1, another copy in 0"}),
            ((at(7), at(200), None), {B: "has topic partition 0 offset 200, where the log has no record"}),
            ((None, at(200), None), {B: "has topic partition 0 offset 200, where the log has no record"}),
        ],
    )
    def test_what_is_wrong_and_where(self, said: Any, faults: dict[str, str]) -> None:
        assert judged(*said).faults == faults

    def test_a_record_under_way_is_waited_for(self) -> None:
        assert judged(at(60), at(7), None, marks=(50, 50, 50)).wait_for == {0: 61}
        assert judged(at(60), at(7), None, marks=(61, 60, 61)).wait_for == {0: 61}
        assert judged(at(60), at(7), None, marks=(61, 61, 61)).faults
        assert judged(at(60), at(60), None, marks=(50, 50, 50)).wait_for == {0: 61}
        # Nobody knows where the log ends: it may be a record.
        assert judged(at(60), at(200), None, marks=(61, 61, 61), ends=None).wait_for == {0: 201}


Log = list[tuple[bool, int]]


@given(
    log=st.lists(st.tuples(st.booleans(), st.integers(0, 1)), min_size=1, max_size=8),
    seen=st.tuples(*[st.lists(st.booleans(), min_size=8, max_size=8)] * 3),
)
def test_healthy_copies_are_never_said_to_differ(log: Log, seen: Any) -> None:
    """Each copy has applied any records of one id, and claims no more than all before the first that it lacks."""
    state = state_of()
    said: dict[str, Heard | None] = {}
    marks = {}
    for worker, applied in zip((A, B, C), seen, strict=True):
        known = [offset for offset in range(len(log)) if applied[offset]]
        marks[worker] = {0: next((offset for offset in range(len(log)) if not applied[offset]), len(log))}
        said[worker] = None
        if known:
            row, cell = log[known[-1]]
            there = row and worker in state.serving[cell]
            said[worker] = at(known[-1], cell if there else DELETED)
    answer = judge(said, marks, {0: len(log)}, state)
    assert not answer.faults


class TestCells:
    def test_sums_that_differ_and_rows_of_strangers(self) -> None:
        same = {0: (2, "11")}
        assert differing_cells(state_of(), {A: same, B: same, C: {}}) == []
        assert differing_cells(state_of(), {A: same, B: {}, C: {}}) == [0]
        assert differing_cells(state_of(), {A: same, B: {0: (2, "12")}, C: {}}) == [0]
        assert differing_cells(state_of(), {A: same, B: same, C: same}) == [0], "C is to hold none of it"
        assert differing_cells(state_of(), {A: {9: (1, "1")}, B: {}, C: {}}) == [9], "there is no such cell"

    @given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
    def test_odd_digests(self, a: set[int], b: set[int], c: set[int]) -> None:
        digests = {name: np.array(sorted(some), dtype=np.uint64) for name, some in ((A, a), (B, b), (C, c))}
        odd = {worker: set(some.tolist()) for worker, some in odd_digests(digests, [A, B]).items()}
        assert odd == {A: a - b, B: b - a, C: c}

    @given(st.lists(st.integers(0, 9)), st.lists(st.integers(0, 9)))
    def test_what_stands_twice_is_odd_though_others_have_it_too(self, a: list[int], b: list[int]) -> None:
        digests = {name: np.array(some, dtype=np.uint64) for name, some in ((A, a), (B, b))}
        odd = {worker: set(some.tolist()) for worker, some in odd_digests(digests, [A, B]).items()}
        twice = {name: {one for one in some if some.count(one) > 1} for name, some in ((A, a), (B, b))}
        assert odd == {A: (set(a) - set(b)) | twice[A], B: (set(b) - set(a)) | twice[B]}


def header_of(offset: int, cell: int) -> Header:
    one = np.array([offset])
    return Header(
        ["x"], one.astype(np.int32) * 0, one, one, np.array([cell], dtype=np.int32),
        np.ones((1, 2), dtype=np.float32), np.array([0]), {"n": [offset]},
    )  # fmt: skip


class TestCorrecting:
    def test_only_who_is_wrong_is_told(self) -> None:
        header, state = header_of(7, 0), state_of()

        def of(worker: str, heard: Heard | None, *, anew: bool = False) -> list[Any]:
            rows = told(header, worker, [heard], [anew], ENDS, state)
            return [(row.action, row.instead.offset) for row in rows]

        assert of(A, at(7)) == of(C, None) == of(C, at(7, DELETED)) == of(C, at(5, DELETED)) == []
        assert of(A, at(7), anew=True) == [(Action.HOLD, 7)]
        assert of(A, None) == [(Action.HOLD, -2)]
        assert of(A, at(200)) == of(A, at(200, DELETED)) == [(Action.HOLD, 200)]
        assert of(A, at(7, 1)) == [(Action.HOLD, 7)]
        assert of(C, at(7)) == [(Action.DROP, 7)]
        assert of(C, at(200, DELETED)) == [(Action.DROP, 200)], "it would refuse the records to come"

    def test_an_id_that_the_log_never_had(self) -> None:
        header = header_without_rows(["x"], [None], 2)
        assert [row.action for row in told(header, A, [at(7)], [False], ENDS, state_of())] == [Action.DROP]
        assert told(header, A, [at(7, DELETED)], [False], ENDS, state_of()) == []
        assert len(told(header, A, [at(200, DELETED)], [False], ENDS, state_of())) == 1

    def test_what_the_log_can_no_longer_say(self) -> None:
        assert no_longer_in_the_log([at(3), at(5, DELETED), None], {0: 10}) == at(5, DELETED)
        assert no_longer_in_the_log([at(3), at(12)], {0: 10}) == at(3)
        assert no_longer_in_the_log([at(12)], {0: 10}) is None


offset = st.one_of(st.none(), st.integers(0, 9))


@given(st.lists(st.booleans(), min_size=10, max_size=10), offset, offset, offset)
def test_whatever_a_store_knew_it_is_right_afterwards(
    log: list[bool], first: int | None, second: int | None, right: int | None
) -> None:
    """`second` comes between the look and the mending: the mended row must not undo it if it is newer."""
    state = state_of()
    store = Store(resolve("host"), 2, "l2")
    header = header_without_rows(["x"], [None], 2)
    live = right is not None and log[right]
    if right is not None:
        header = header_of(right, 0) if live else header_without_rows(["x"], [at(right, DELETED)], 2)

    def send(offset: int) -> None:
        live = log[offset]
        one = np.array([offset])
        vectors = np.full((int(live), 2), float(offset), dtype=np.float32)
        action = np.array([Action.HOLD if live else Action.DROP], dtype=np.uint8)
        store.apply(Batch(["x"], one.astype(np.int32) * 0, one, one, one.astype(np.int32) * 0, action, vectors))

    def heard() -> Heard | None:
        (one,), _ = store.heard(["x"])
        return None if one is None else Heard(*one)

    if first is not None:
        send(first)
    before = heard()
    rows = told(header, A, [before], [False], {0: 100}, state)
    if second is not None:
        send(second)
    moved = heard() != before
    store_before = heard()
    if rows:
        store.apply(batch_of(header, rows))
    after = heard()
    if not moved:
        assert (after is not None and after.live) == live
        if live:
            assert right is not None
            assert after == at(right)
            (row,), _ = store.get(["x"])
            assert row is not None
            assert row.attributes == ({"n": right} if rows else {})
    elif store_before is not None and (right is None or store_before.offset > right):
        assert after == store_before, "what came meanwhile is newer"
