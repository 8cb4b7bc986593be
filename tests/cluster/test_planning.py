"""What the plan keeps true while workers come and go and the codebook changes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from headrace.cluster.going_on import goes_on
from headrace.cluster.planning import adopt_codebook, attached, membership, moves, rebalanced, settle, topic_found
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook

WORKERS = [f"tcp://10.0.0.{number}:4000" for number in range(1, 7)]
A, B, C, D = WORKERS[:4]
SOURCE = Source("localhost:9092", "docs", 8, "json", {0: 5})


def begin(*workers: str, replicas: int = 2, source: Source | None = SOURCE) -> CollectionState:
    spec = CollectionSpec("docs", dim=2, cells=6, replicas=replicas)
    state = membership(CollectionState(spec=spec, codebook=first_codebook(2)), workers)
    return attached(state, source) if source else state


def centroids(cells: int) -> np.ndarray:
    return np.arange(2 * cells, dtype=np.float32).reshape(cells, 2)


def roles(state: CollectionState) -> dict[str, str]:
    return dict(state.members)


class TestMembership:
    def test_the_first_workers_are_active_at_once(self) -> None:
        state = begin(B, A)
        assert roles(state) == {A: "active", B: "active"}
        assert (state.epoch, state.incarnation, state.moving, state.alarms) == (2, 0, False, ())
        assert set(state.serving[0]) == {A, B}
        assert Counter(state.readers.values()) == {A: 4, B: 4}

    def test_the_same_workers_change_nothing(self) -> None:
        state = begin(A, B)
        assert membership(state, [B, A]) is state
        assert membership(state, {A: 1, B: 2}, {0: 100}) is state

    def test_a_worker_that_joins_is_written_to_and_not_read(self) -> None:
        state = membership(begin(A), [A, B])
        assert roles(state) == {A: "active", B: "joining"}
        assert state.copies == {0: (A, B)}
        assert state.serving == {0: (A,)}
        assert state.moving
        assert moves(state) == {A: [0]}
        assert set(state.readers.values()) == {A}
        assert state.active == (A,)
        done = settle(state)
        assert roles(done) == {A: "active", B: "active"}
        assert done.serving == done.copies == {0: (A, B)}
        assert moves(done) == {}
        assert Counter(done.readers.values()) == {A: 4, B: 4}
        assert done.epoch == state.epoch + 1

    def test_a_worker_that_joins_and_is_given_nothing_becomes_active_too(self) -> None:
        state = membership(begin(A, B), [A, B, C])
        assert roles(state)[C] == "joining"
        assert state.moving, "nobody would make it active"
        assert moves(state) == {}
        assert roles(settle(state))[C] == "active"

    def test_the_survivors_copies_go_on_serving(self) -> None:
        state = settle(adopt_codebook(begin(A, B, C), centroids(6)))
        lost = membership(state, [A, C])
        assert lost.incarnation == state.incarnation
        assert set(lost.copies) == set(state.codebook.cells)
        for cell, holders in lost.copies.items():
            assert set(holders) == {A, C}
            assert set(lost.serving[cell]) == set(state.copies[cell]) - {B}
        assert set(lost.readers.values()) == {A, C}
        work = moves(lost)
        assert sorted(cell for cells in work.values() for cell in cells) == [
            cell for cell in state.codebook.cells if B in state.copies[cell]
        ]

    def test_a_joining_worker_cannot_take_over(self) -> None:
        state = membership(begin(A), [A, B])
        after = membership(state, [B])
        assert after.incarnation == state.incarnation + 1
        assert roles(after) == {B: "active"}
        assert after.serving == after.copies == {0: (B,)}
        assert "1 cells was lost" in after.alarms[-1]

    def test_a_lost_cell_begins_the_collection_again_with_its_codebook(self) -> None:
        state = settle(adopt_codebook(begin(A, B, replicas=1), centroids(6)))
        half = [cell for cell, holders in state.copies.items() if holders == (A,)]
        after = membership(state, [B, C])
        assert after.incarnation == 1
        assert after.codebook is state.codebook
        assert (after.moving, after.previous) == (False, None)
        assert roles(after) == {B: "active", C: "active"}
        assert f"{len(half)} cells" in after.alarms[-1]
        assert set(after.readers) == set(range(8))

    def test_all_gone_and_back_begins_again_once(self) -> None:
        gone = membership(begin(A, B), [])
        assert (dict(gone.members), dict(gone.readers), gone.alarms) == ({}, {}, ())
        back = membership(gone, [C])
        assert back.incarnation == gone.incarnation + 1
        assert len(back.alarms) == 1
        assert set(back.readers.values()) == {C}

    def test_nothing_is_lost_before_there_is_a_source(self) -> None:
        after = membership(begin(A, source=None), [B])
        assert (after.incarnation, after.alarms, dict(after.readers)) == (0, (), {})
        assert after.serving == {0: (B,)}


class TestMoving:
    def test_a_worker_that_joins_gets_its_share_and_the_old_copies_serve_until_then(self) -> None:
        before = settle(adopt_codebook(begin(A, B, replicas=1), centroids(6)))
        state = membership(before, [A, B, C])
        taken = [cell for cell in state.codebook.cells if C in state.copies[cell]]
        assert len(taken) == 2
        for cell in taken:
            assert state.serving[cell] == state.surplus[cell] == before.copies[cell]
            assert set(state.copies[cell]) == {C, *before.copies[cell]}
        assert sorted(cell for cells in moves(state).values() for cell in cells) == taken
        done = settle(state)
        assert all(done.copies[cell] == done.serving[cell] == (C,) for cell in taken)
        assert Counter(holder for holders in done.copies.values() for holder in holders) == {A: 2, B: 2, C: 2}

    def test_a_worker_is_emptied(self) -> None:
        before = settle(adopt_codebook(begin(A, B, C), centroids(6)))
        state = membership(before, [A, B, C], leaving=[B])
        assert state.leaving == (B,)
        assert roles(state)[B] == "active", "it is read until others have its rows"
        assert set(state.readers.values()) == {A, C}
        assert all((B in state.surplus.get(cell, ())) == (B in before.copies[cell]) for cell in before.codebook.cells)
        done = settle(state)
        assert all(set(holders) == {A, C} for holders in done.copies.values())
        back = membership(done, [A, B, C])
        assert back.leaving == ()
        assert any(B in holders for holders in back.copies.values())
        assert set(membership(done, [A, C]).readers.values()) == {A, C}
        assert membership(done, [A, C]).incarnation == 0, "an emptied worker was missed"

    def test_not_all_can_be_emptied(self) -> None:
        state = membership(begin(A, B), [A, B], leaving=[A, B])
        assert all(set(holders) == {A, B} for holders in state.copies.values())
        assert set(state.readers.values()) == {A, B}

    def test_a_worker_lost_in_the_middle_of_a_move(self) -> None:
        state = membership(settle(adopt_codebook(begin(A, B, replicas=1), centroids(6))), [A, B, C])
        back = membership(state, [A, B])
        assert back.incarnation == 0, "the old copies were there all the time"
        assert not back.surplus
        assert back.copies == back.serving
        assert not back.moving

    def test_rows_decide_what_is_evened_out(self) -> None:
        state = settle(adopt_codebook(begin(A, B, replicas=1), centroids(6)))
        mine = [cell for cell, holders in state.copies.items() if holders == (A,)]
        assert rebalanced(state, dict.fromkeys(state.codebook.cells, 100)) is state
        after = rebalanced(state, dict.fromkeys(mine, 1000))
        assert after.moving
        assert set(after.surplus) < set(mine)
        assert set(after.surplus.values()) == {(A,)}
        assert rebalanced(after, {}) is after, "one move at a time"


class TestCodebook:
    def test_new_cells_serve_at_once_and_old_rows_wait(self) -> None:
        state = begin(A, B)
        after = adopt_codebook(state, centroids(6))
        assert (after.codebook.generation, after.codebook.first, list(after.codebook.cells)) == (
            1,
            1,
            [1, 2, 3, 4, 5, 6],
        )
        assert after.previous is state.codebook
        assert after.cells == [1, 2, 3, 4, 5, 6, 0]
        assert after.copies == after.serving
        assert set(after.copies) == set(range(7))
        assert moves(after) == {after.serving[0][0]: [0]}
        done = settle(after)
        assert set(done.copies) == set(range(1, 7))
        assert done.previous is None
        assert not done.moving
        assert adopt_codebook(done, centroids(3)).codebook.first == 7, "a cell's number was used twice"

    def test_a_second_one_must_wait_for_the_first(self) -> None:
        with pytest.raises(ValueError, match="still moves to codebook 1: settle first"):
            adopt_codebook(adopt_codebook(begin(A), centroids(6)), centroids(6))

    def test_a_worker_lost_while_rows_wait(self) -> None:
        state = adopt_codebook(begin(A, B), centroids(6))
        after = membership(state, [B])
        assert after.incarnation == state.incarnation
        assert after.previous is state.previous
        assert after.serving[0] == (B,)
        assert moves(after) == {B: [0]}
        assert after.moving

    def test_a_worker_that_joins_while_rows_wait_gets_new_cells_only(self) -> None:
        state = adopt_codebook(begin(A), centroids(6))
        after = membership(state, [A, B])
        assert after.copies[0] == after.serving[0] == (A,)
        assert all(after.copies[cell] == (A, B) and after.serving[cell] == (A,) for cell in range(1, 7))
        assert sorted(moves(after)[A]) == list(range(7))


class TestTopic:
    def test_its_id_is_learnt_without_a_new_incarnation(self) -> None:
        state = begin(A, B)
        known = replace(SOURCE, topic_id="one", origins={0: 99})
        found = topic_found(state, known)
        assert found.source == replace(SOURCE, topic_id="one"), "the log's origin is what it was when ingest began"
        assert found == state.with_(epoch=state.epoch + 1, source=found.source)

    @pytest.mark.parametrize("partitions", [1, 2, 5])
    def test_another_begins_empty_with_everybody(self, partitions: int) -> None:
        old = begin(A, B, C, source=replace(SOURCE, topic_id="one")).with_(schema={"n": "int"}, alarms=("before",))
        moving = membership(adopt_codebook(old, centroids(4)), [A, B, C, D])
        source = replace(SOURCE, topic_id="two", partitions=partitions, origins=dict.fromkeys(range(partitions), 7))
        new = topic_found(moving, source)
        assert (new.epoch, new.incarnation) == (moving.epoch + 1, moving.incarnation + 1)
        assert new.source == source
        assert set(new.members.values()) == {"active"}
        assert set(new.members) == {A, B, C, D}
        assert (new.codebook.generation, new.previous, new.moving, new.restoring) == (0, None, False, None)
        assert new.copies == new.serving
        assert len(new.copies[0]) == 2
        assert sorted(new.readers) == list(range(partitions))
        assert set(new.readers.values()) <= set(new.members)
        assert new.schema == {"n": "int"}, "what was declared holds for the new topic too"
        assert new.alarms[0] == "before"
        assert "made anew (id two, before one)" in new.alarms[1]
        assert topic_found(old.with_(alarms=new.alarms), source).alarms == new.alarms, "told by a worker already"


class PlanMachine(RuleBasedStateMachine):
    """The invariants of a plan after any history, with what each worker really holds tracked beside it."""

    @initialize(replicas=st.integers(1, 3), workers=st.sets(st.sampled_from(WORKERS), min_size=1, max_size=4))
    def start(self, replicas: int, workers: set[str]) -> None:
        spec = CollectionSpec("docs", dim=2, cells=6, replicas=replicas)
        self.state = CollectionState(spec=spec, codebook=first_codebook(2))
        self.filled: dict[str, set[int]] = {}
        self.live = set(workers)
        self.known: list[CollectionState] = []
        self.readable: dict[str, int] = {}
        self.change(membership(self.state, self.live))
        self.change(attached(self.state, SOURCE))

    def change(self, new: CollectionState) -> None:
        old, self.state = self.state, new
        if new is old:
            return
        assert new.epoch == old.epoch + 1
        assert new.incarnation in (old.incarnation, old.incarnation + 1)
        assert new.codebook.generation >= old.codebook.generation
        assert set(old.alarms) <= set(new.alarms)
        if new.incarnation != old.incarnation:
            self.filled = {}
            assert len(new.alarms) == len(old.alarms) + 1
            assert any(not {a for a in old.serving[cell] if a in new.members} for cell in old.cells)
        if new.incarnation != old.incarnation or not old.members:
            # Stores begin empty, and are complete for all that they are sent.
            self.filled = {worker: set(new.cells) for worker in new.members}
        self.filled = {worker: self.filled.get(worker, set()) for worker in new.members}

    @rule(
        workers=st.sets(st.sampled_from(WORKERS), max_size=6),
        rows=st.dictionaries(st.integers(0, 20), st.integers(0, 99)),
        leaving=st.sets(st.sampled_from(WORKERS), max_size=2),
    )
    def workers_change(self, workers: set[str], rows: dict[int, int], leaving: set[str]) -> None:
        before = self.state
        assert membership(before, self.live, leaving=before.leaving) is before
        leaving &= workers
        once, again = membership(before, workers, rows, leaving), membership(before, sorted(workers), rows, leaving)
        assert once.to_wire() == again.to_wire(), "not deterministic"
        self.live = set(workers)
        self.change(once)

    @precondition(lambda self: self.state.active and not self.state.moving)
    @rule(cells=st.integers(1, 6))
    def train(self, cells: int) -> None:
        self.change(adopt_codebook(self.state, centroids(cells)))
        for cell in self.state.codebook.cells:
            for worker in self.state.copies[cell]:
                self.filled[worker].add(cell)

    @rule(rows=st.dictionaries(st.integers(0, 20), st.integers(0, 99)))
    def rows_grow(self, rows: dict[int, int]) -> None:
        self.change(rebalanced(self.state, rows))

    @precondition(lambda self: self.state.members and self.state.source)
    @rule(partitions=st.integers(1, 9))
    def the_topic_is_made_anew(self, partitions: int) -> None:
        before = self.state
        known = before.source.topic_id or "0"
        origins = dict.fromkeys(range(partitions), 0)
        seen = replace(SOURCE, topic_id=f"{int(known) + 1}", partitions=partitions, origins=origins)
        self.state = topic_found(topic_found(before, replace(SOURCE, topic_id=known)), seen)
        assert self.state.incarnation == before.incarnation + 1
        assert len(self.state.alarms) == len(before.alarms) + 1
        assert set(self.state.readers) == set(range(partitions))
        self.filled = {worker: set(self.state.cells) for worker in self.state.members}
        assert membership(self.state, self.live, leaving=self.state.leaving) is self.state

    @precondition(lambda self: self.state.moving)
    @rule()
    def rows_arrive(self) -> None:
        state = self.state
        work = moves(state)
        sent = {cell for cells in work.values() for cell in cells}
        assert set(work) <= set(state.active), "somebody who is not read was told to send"
        assert sum(map(len, work.values())) == len(sent), "a cell is sent by two"
        for worker, cells in work.items():
            assert all(worker in state.serving[cell] and cell in self.filled[worker] for cell in cells)
        if state.previous is not None:
            assert sent >= set(state.previous.cells)
        for cell, holders in state.copies.items():
            for worker in holders:
                assert cell in sent or cell in self.filled[worker], "nobody fills a copy"
                self.filled[worker].add(cell)
        self.change(settle(state))
        assert set(self.state.active) == set(self.state.members)
        assert moves(self.state) == {}
        assert membership(self.state, self.live, leaving=self.state.leaving) is self.state

    @invariant()
    def cells_are_served_by_complete_copies(self) -> None:
        state = self.state
        assert set(state.members) == self.live
        assert set(state.copies) == set(state.serving) == set(state.cells)
        for cell in state.cells:
            holders, serving = state.copies[cell], state.serving[cell]
            stay = [worker for worker in holders if worker not in state.surplus.get(cell, ())]
            assert len(set(holders)) == len(holders)
            assert len(stay) <= state.spec.replicas
            assert set(state.surplus.get(cell, ())) <= set(serving), "a copy that is not complete was kept"
            assert set(serving) <= set(holders) <= self.live
            assert set(serving) <= set(state.active)
            assert all(cell in self.filled[worker] for worker in serving), "a read would miss rows"
            if self.live:
                assert serving, "nobody answers for a cell"
                if cell in state.codebook.cells:
                    there = set(state.active if state.moving else self.live)
                    wanted = min(state.spec.replicas, len(there - set(state.leaving)) or len(there))
                    assert len(holders) >= wanted
        if not state.moving:
            assert not state.surplus
            assert state.copies == state.serving
            if set(state.members) - set(state.leaving):
                emptied = {a for holders in state.copies.values() for a in holders} & set(state.leaving)
                assert not emptied, "a worker that was to be emptied holds something"
            assert state.previous is None
            assert "joining" not in state.members.values()

    @invariant()
    def a_read_by_an_older_plan_misses_no_row_or_is_refused(self) -> None:
        old, new = self.known[-1] if self.known else None, self.state
        if old is not None and new is not old:
            self.readable = {
                worker: self.readable[worker] if worker in old.members and goes_on(old, new, worker) else new.epoch
                for worker in new.members
            }
        elif old is None:
            self.readable = dict.fromkeys(new.members, new.epoch)
        self.known = [*self.known, new][-12:]
        for past in self.known:
            answering = {
                cell: [w for w in past.serving[cell] if self.readable.get(w, new.epoch + 1) <= past.epoch]
                for cell in past.cells
            }
            if all(answering.values()):
                assert set(new.cells) <= set(past.cells), "rows are in cells that it does not ask for"
                for cell in new.cells:
                    assert set(answering[cell]) <= set(new.serving[cell]), "it reads a copy that is not complete"

    @invariant()
    def everything_is_read(self) -> None:
        state = self.state
        if not state.active:
            assert not state.readers
        elif state.source is not None:
            assert sorted(state.readers) == list(range(state.source.partitions))
            shares = Counter(state.readers.values())
            assert set(shares) <= set(state.active)
            readers = set(state.active) - set(state.leaving) or set(state.active)
            assert set(shares) <= readers
            assert max(shares.values()) - min(shares[worker] for worker in readers) <= 1


TestPlanMachine = PlanMachine.TestCase
TestPlanMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
