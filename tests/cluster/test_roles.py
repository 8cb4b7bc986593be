"""Workers that only read topics, and workers that only hold rows: what the plan gives each of them."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cluster.attendance import Attendance
from headrace.cluster.planning import adopt_codebook, attached, begun_anew, membership, moves, settle, topic_found
from headrace.cluster.retiring import Retiring
from headrace.cluster.roles import BOTH, INGEST, ROLES, SEARCH, may_hold, may_ingest
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.gpu.errors import ClusterError
from headrace.pipeline.copies import Copies
from headrace.pipeline.summary import summarise

A, B, C, D = WORKERS = [f"tcp://10.0.0.{number}:4000" for number in range(1, 5)]
SOURCE = Source("localhost:9092", "docs", 6, "json", {0: 5}, "one")


def begin(**roles: str) -> CollectionState:
    """A collection of the workers that are named by their letters."""
    given = {globals()[name]: role for name, role in roles.items()}
    spec = CollectionSpec("docs", dim=2, cells=6, replicas=2)
    return attached(membership(CollectionState(spec=spec, codebook=first_codebook(2)), given, roles=given), SOURCE)


def named(state: CollectionState) -> set[str]:
    """Workers that hold something, or are to."""
    everywhere = (state.copies, state.serving, state.surplus)
    return {worker for placed in everywhere for holders in placed.values() for worker in holders}


def test_each_is_given_what_it_is_there_for() -> None:
    state = begin(A=INGEST, B=SEARCH, C=BOTH)
    assert dict(state.members) == dict.fromkeys([A, B, C], "active")
    assert named(state) == {B, C}
    assert set(state.readers.values()) == {A, C}
    assert state.roles == {A: INGEST, B: SEARCH}
    assert CollectionState.from_wire(state.to_wire()).roles == state.roles


def test_the_same_workers_with_the_same_roles_change_nothing() -> None:
    state = begin(A=INGEST, B=SEARCH)
    assert membership(state, [B, A], roles={A: INGEST, B: SEARCH, D: INGEST}) is state
    assert membership(state, [B, A], roles={B: SEARCH}) is not state


def test_copies_are_counted_by_those_that_may_hold() -> None:
    state = settle(adopt_codebook(begin(A=INGEST, B=SEARCH, C=INGEST), np.eye(6, 2, dtype=np.float32)))
    assert all(holders == (B,) for holders in state.copies.values())
    joined = membership(state, [A, B, C, D], roles={**state.roles, D: SEARCH})
    assert all(set(holders) == {B, D} for holders in joined.copies.values())
    assert moves(joined) == {B: list(state.codebook.cells)}
    assert set(settle(joined).readers.values()) == {A, C}


def test_topic_partitions_wait_while_nobody_may_read_and_nothing_is_lost() -> None:
    roles = {A: INGEST, B: SEARCH}
    before = begin(A=INGEST, B=SEARCH)
    waiting = membership(before, [B], roles=roles)
    assert (waiting.readers, waiting.incarnation, waiting.serving) == ({}, before.incarnation, {0: (B,)})
    again = settle(membership(waiting, [B, C], roles={B: SEARCH, C: INGEST}))
    assert set(again.readers.values()) == {C}
    assert (len(again.readers), again.incarnation) == (SOURCE.partitions, before.incarnation)


def test_nobody_reads_while_nobody_may_hold() -> None:
    # Records that are read and applied nowhere would count as done.
    before = begin(A=INGEST, B=SEARCH)
    nobody = membership(before, [A], roles=before.roles)
    assert (dict(nobody.members), nobody.readers, nobody.roles) == ({}, {}, {})
    assert membership(nobody, [A], roles=before.roles) is nobody
    assert membership(nobody, [], roles={}) is nobody
    back = membership(nobody, [A, C], roles={A: INGEST, C: SEARCH})
    assert back.incarnation == before.incarnation + 1, "the last copy was lost, and the log is read again"
    assert (named(back), set(back.readers.values())) == ({C}, {A})


def test_a_topic_made_anew_and_a_loss_keep_the_roles() -> None:
    state = begin(A=INGEST, B=SEARCH, C=BOTH)
    anew = topic_found(state, Source("localhost:9092", "docs", 6, "json", {}, "two"))
    again = begun_anew(state, state.members)
    for after in (anew, again):
        assert (named(after), set(after.readers.values())) == ({B, C}, {A, C})


@given(
    st.lists(st.dictionaries(st.sampled_from(WORKERS), st.sampled_from(ROLES)), min_size=1, max_size=6),
    st.booleans(),
)
def test_whoever_comes_and_goes_nobody_is_given_what_it_is_not_there_for(
    histories: list[dict[str, str]], book: bool
) -> None:
    state = begin(A=SEARCH, B=BOTH)
    for live in histories:
        state = membership(state, live, roles=live)
        for now in (state, settle(state)) if state.members else (state,):
            assert bool(now.members) == bool(may_hold(live, live))
            assert set(now.readers.values()) <= set(may_ingest(now.members, live))
            if now.members:
                assert all(set(holders) & set(may_hold(live, live)) for holders in now.copies.values())
        if state.members:
            state = settle(state)
            assert named(state) <= set(may_hold(live, live))
            assert bool(state.readers) == bool(may_ingest(live, live))
            if book:
                state = settle(adopt_codebook(state, np.eye(4, 2, dtype=np.float32)))


class TestDraining:
    def test_the_last_of_its_kind_cannot_be_drained(self) -> None:
        state = begin(A=INGEST, B=SEARCH)
        workers = Attendance(state.roles)
        with pytest.raises(ClusterError, match="last worker that holds"):
            workers.check_drain(state, B)
        with pytest.raises(ClusterError, match="last worker that may read the topic"):
            workers.check_drain(state, A)
        workers.check_drain(state.with_(source=None), A)
        wider = begin(A=INGEST, B=SEARCH, C=BOTH)
        for worker in (A, B):
            Attendance(wider.roles).check_drain(wider, worker)

    def test_a_worker_is_empty_once_others_hold_and_read_what_it_did(self) -> None:
        roles = {A: INGEST, B: SEARCH}
        before, workers = begin(A=INGEST, B=SEARCH, C=BOTH), Attendance(roles)
        assert workers.can_do_without(before, [B])
        assert not workers.can_do_without(before, [B, C]), "who would hold it?"
        assert not workers.can_do_without(before, [D]), "it has nothing"
        leaving = membership(before, [A, B, C], leaving=[B], roles=roles)
        assert not workers.has_emptied(before, B)
        assert not workers.has_emptied(leaving.with_(moving=True), B)
        assert workers.has_emptied(settle(leaving), B)
        reading = membership(before, [A, B, C], leaving=[A], roles=roles)
        assert workers.has_emptied(settle(reading), A)
        assert not workers.has_emptied(settle(reading).with_(readers={0: A}), A)
        assert workers.has_emptied(reading, D)

    def test_the_only_reader_may_end_all_the_same(self) -> None:
        state = begin(A=INGEST, B=SEARCH)
        leaving = membership(state, [A, B], leaving=[A], roles=state.roles)
        assert set(leaving.readers.values()) == {A}, "it goes on reading until it ends"
        assert Attendance(state.roles).has_emptied(settle(leaving), A)


class Kept:
    """A coordinator of which one is told what it is asked."""

    def __init__(self, *, needed: bool = True) -> None:
        self.drained: list[str] = []
        self.empty: set[str] = set()
        self.needed = needed
        self.state = SimpleNamespace(spec=SimpleNamespace(name="docs"))

    def can_do_without(self, going: list[str]) -> bool:
        return self.needed

    def drain(self, worker: str) -> None:
        self.drained.append(worker)

    def has_emptied(self, worker: str) -> bool:
        return worker in self.empty


class DaskScheduler:
    """As much of Dask's as is touched."""

    def __init__(self) -> None:
        self.workers = {A: SimpleNamespace(name=0), B: SimpleNamespace(name="two")}
        self.handlers: dict[str, Any] = {}
        self.retired: list[tuple[Any, ...]] = []

    def workers_to_close(self, **about: Any) -> list[str]:
        return [B]

    async def retire_workers(self, workers: Any = None, *, names: Any = None, **options: Any) -> str:
        self.retired.append((workers, names, options))
        return "retired"


class Scheduler(Retiring):
    def __init__(self, *coordinators: Kept, drain: float = 60.0) -> None:
        self.dask = self._scheduler = DaskScheduler()
        self._ready, self._going, self.drain_deadline = {A: "1", B: "2"}, set(), drain
        self._coordinators = dict(enumerate(coordinators))  # type: ignore[arg-type]
        self.hear_of_retirement()


@pytest.mark.parametrize(
    ("asked", "going"),
    [
        ({"workers": [A]}, [A]),
        ({"workers": [0, "nobody"]}, [A]),  # so ask Dask's clusters: their own names for addresses
        ({"names": ["0", "two"]}, [A, B]),
        ({"n": 1, "remove": True}, [B]),
    ],
)
async def test_whoever_retires_workers_waits_until_they_are_empty(asked: dict[str, Any], going: list[str]) -> None:
    kept = Kept()
    scheduler = Scheduler(kept)
    retiring = asyncio.create_task(scheduler.dask.handlers["retire_workers"](**asked))
    async with asyncio.timeout(20):
        while kept.drained != going:
            await asyncio.sleep(0.01)
    assert not scheduler.dask.retired
    kept.empty.update(going)
    assert await asyncio.wait_for(retiring, 20) == "retired"
    ((workers, names, options),) = scheduler.dask.retired
    assert (workers or names) == asked.get("workers", asked.get("names", [B]))
    assert "n" not in options, "Dask would choose once more"


async def test_workers_that_nobody_can_stand_in_for_retire_at_once_and_others_after_the_deadline() -> None:
    for scheduler in (Scheduler(Kept(needed=False)), Scheduler(Kept(), drain=0.0), Scheduler()):
        assert await asyncio.wait_for(scheduler.dask.retire_workers(workers=[A]), 20) == "retired"
    late = Kept()
    assert await asyncio.wait_for(Scheduler(late, drain=0.1).dask.retire_workers(workers=[A]), 20) == "retired"
    assert late.drained == [A]


async def test_the_plugin_that_is_started_twice_stands_in_the_way_once() -> None:
    scheduler = Scheduler()
    before = scheduler.dask.retire_workers
    scheduler.hear_of_retirement()
    assert scheduler.dask.retire_workers is before


def test_a_query_is_encoded_by_those_that_answer_it() -> None:
    async def nobody(*_: Any, **__: Any) -> dict[str, Any]:
        raise AssertionError

    copies, state = Copies(nobody), begin(A=INGEST, B=SEARCH, C=BOTH)
    assert {copies.in_turn(state)[0] for _ in range(6)} == {B, C}


def test_status_says_who_is_missing_and_what_each_is_there_for() -> None:
    def notes(state: CollectionState) -> list[str]:
        return list(summarise(state, [], [])["notes"])

    whole = begin(A=INGEST, B=SEARCH)
    assert not [note for note in notes(whole) if "role" in note]
    shown = summarise(whole, [{"address": address, "state": "?"} for address in (A, B)], [])["workers"]
    assert [worker["role"] for worker in shown] == [INGEST, SEARCH]
    assert any("may read the topic" in note for note in notes(membership(whole, [B], roles=whole.roles)))
    assert any("may hold rows" in note for note in notes(membership(whole, [A], roles=whole.roles)))
