"""One worker's copy: it claims no offset that it has not applied, and obeys no older epoch."""

from __future__ import annotations

import asyncio
import gc
import re
import weakref
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.gpu.backend import resolve
from headrace.gpu.budget import Budget
from headrace.gpu.errors import ConsistencyTimeout, StoreFull
from headrace.gpu.rows import DELETED, Action, Batch
from headrace.gpu.store import Applied, StoreSettings
from headrace.gpu.versions import Versions
from tests.gpu.batches import DIM, batch_of

ME, PEER = "tcp://me:1", "tcp://peer:2"
SPEC = CollectionSpec("docs", dim=DIM)


def state_of(**changes: Any) -> CollectionState:
    state = CollectionState(
        spec=SPEC,
        codebook=first_codebook(DIM),
        epoch=5,
        members={ME: "active", PEER: "active"},
        copies={0: (ME, PEER)},
        serving={0: (ME, PEER)},
        source=Source("localhost:9092", "docs", 2, "json", {0: 100, 1: 0}),
    )
    return state.with_(**changes)


def replica_of(**changes: Any) -> Replica:
    return Replica(state_of(**changes), ME, resolve("host"), StoreSettings())


def one(row_id: Any, offset: int, partition: int = 0, cell: int = 0) -> Batch:
    return batch_of([{"id": row_id, "offset": offset, "partition": partition, "cell": cell}])


def send(replica: Replica, offset: int, *, partition: int = 0, epoch: int = 5, cell: int = 0) -> Applied | None:
    batch = one(f"r{partition}-{offset}", offset, partition, cell)
    return replica.apply(batch, {partition: (offset, offset + 1)}, {}, epoch)


class TestLettingGo:
    @pytest.mark.parametrize("how", ["closed", "begun anew"])
    def test_what_it_held_is_free_at_once(self, how: str) -> None:
        budget = Budget(1 << 30, 1 << 30)
        replica = Replica(state_of(), ME, resolve("host"), StoreSettings(), budget)
        assert replica.apply(one("a", 100), {0: (100, 101)}, {}, 5)
        replica.store.statistics()
        assert budget.held > 0
        table = weakref.ref(replica.store._table)
        gc.disable()  # it may not come by for long
        try:
            if how == "closed":
                replica.close()
            else:
                replica.adopt(state_of(incarnation=1, epoch=6))
            assert table() is None
        finally:
            gc.enable()
        assert budget.held == 0

    def test_nothing_comes_into_one_that_is_closed_and_reads_go_elsewhere(self) -> None:
        replica = replica_of()
        send(replica, 100)
        reading = replica.store
        replica.close()
        assert send(replica, 101) is None
        assert replica.fence > 10**9
        assert reading.view.rows == 1, "who was reading it does so to the end"


class TestMoments:
    """A read may be answered from a moment ago, but from none before what it goes by was known here."""

    @pytest.fixture
    def replica(self) -> Replica:
        replica = replica_of()
        for offset in (100, 101):
            send(replica, offset)
        replica.apply(
            batch_of([{"id": "r0-100", "offset": 102, "cell": 3, "action": Action.DROP}]), {0: (102, 103)}, {}, 5
        )
        return replica

    def test_the_moment_before_a_row_went(self, replica: Replica) -> None:
        assert replica.store.view.moved == {0: 103}
        before = replica.moment(5, {0: 102}, {0: 102})
        assert before is not None
        assert (before.rows, before.stamp[0]) == (2, 102)
        assert replica.moment(5, {0: 103}, {}) is replica.store.view
        assert replica.moment(5, {0: 102}, {0: 103}) is None, "that record must have been applied"
        assert replica.moment(6, {0: 102}, {}) is None, "what was complete then is not known"

    @pytest.mark.parametrize("what", ["a state", "a record of a newer epoch", "a mended row", "its end"])
    def test_what_was_before_is_not_shown_after(self, replica: Replica, what: str) -> None:
        if what == "a state":
            replica.adopt(state_of(epoch=6))
        elif what == "a record of a newer epoch":
            send(replica, 103, epoch=6)
        elif what == "a mended row":
            replica.remember(60.0)
            mended = replace(one("r0-101", 103), instead=Versions.unknown(1))
            assert replica.apply(mended, {}, {}, 5) is not None
        else:
            replica.close()
        assert replica.moment(5, {0: 102}, {}) is None


class TestWatermarks:
    def test_they_begin_where_the_log_begins(self) -> None:
        assert replica_of().watermarks == {0: 100, 1: 0}
        assert replica_of().store.view.stamp == {0: 100, 1: 0}
        assert replica_of(source=None).watermarks == {}

    def test_a_source_that_is_attached_later_begins_too(self) -> None:
        replica = replica_of(source=None)
        replica.adopt(state_of(epoch=6))
        assert replica.store.view.stamp == {0: 100, 1: 0}

    def test_what_lies_behind_a_hole_may_have_moved_rows_that_are_not_here_yet(self) -> None:
        replica = replica_of()
        away = {"id": "x", "cell": 3, "action": Action.DROP}
        replica.apply(batch_of([{**away, "offset": 100}]), {0: (100, 101)}, {}, 5)
        assert replica.store.view.moved == {}
        replica.apply(batch_of([{**away, "offset": 105}]), {0: (105, 106)}, {}, 5)
        assert replica.store.view.moved == {0: 106}

    def test_a_copy_that_is_being_filled_may_have_missed_rows_that_moved_on(self) -> None:
        replica = replica_of(members={ME: "joining", PEER: "active"}, serving={0: (PEER,)}, moving=True)
        away = {"id": "x", "cell": 3, "action": Action.DROP}
        replica.apply(batch_of([{**away, "offset": 0}]), {0: (0, 1)}, {}, 5)
        assert replica.store.view.moved == {0: 1}
        replica.adopt(state_of(epoch=6))
        replica.apply(batch_of([{**away, "offset": 1}]), {0: (1, 2)}, {}, 6)
        assert replica.store.view.moved == {0: 1}

    def test_they_stop_at_a_hole(self) -> None:
        replica = replica_of()
        send(replica, 101)
        send(replica, 0, partition=1)
        assert replica.watermarks == {0: 100, 1: 1}
        assert replica.store.view.stamp == {0: 100, 1: 1}
        assert replica.store.view.rows == 2
        send(replica, 100)
        assert replica.watermarks == {0: 102, 1: 1}
        assert replica.store.view.stamp == {0: 102, 1: 1}
        send(replica, 100)
        assert replica.watermarks == {0: 102, 1: 1}

    def test_offsets_without_records_count(self) -> None:
        replica = replica_of()
        assert replica.apply(None, {0: (100, 150)}, {}, 5) == Applied(0, 0, 0, ())
        assert replica.apply(batch_of([]), {0: (150, 160)}, {}, 5) == Applied(0, 0, 0, ())
        assert replica.store.view.stamp[0] == 160

    def test_rows_that_move_claim_no_offsets(self) -> None:
        replica = replica_of()
        replica.apply(one("moved", 500), {}, {}, 5)
        assert replica.watermarks == {0: 100, 1: 0}
        assert replica.store.view.rows == 1

    def test_a_batch_that_was_not_applied_is_not_claimed(self) -> None:
        replica = replica_of()
        broken = replace(one("a", 100), vectors=np.zeros((1, DIM + 1), dtype=np.float32))
        with pytest.raises(ValueError, match="vectors have shape"):
            replica.apply(broken, {0: (100, 101), 1: (0, 9)}, {}, 5)
        send(replica, 101)
        assert replica.watermarks == {0: 100, 1: 0}

    def test_a_full_worker_claims_nothing_that_it_refused(self) -> None:
        replica = Replica(state_of(), ME, resolve("host"), StoreSettings(memory_limit=400_000))

        def fill() -> None:
            for offset in range(100, 100_000):
                send(replica, offset)

        with pytest.raises(StoreFull):
            fill()
        assert replica.watermarks == {0: 100 + replica.store.view.rows, 1: 0} == replica.store.view.stamp
        assert replica.status()["memory"]["full"]
        assert send(replica, 0, partition=1, cell=DELETED) is not None, "a deletion goes through"
        assert replica.watermarks[1] == 1

    def test_remembered_deletions_give_way_where_there_is_no_room(self) -> None:
        replica = Replica(state_of(), ME, resolve("host"), StoreSettings(memory_limit=400_000))

        def delete(offset: int, stable: int) -> None:
            rows = [
                {"id": f"unknown {offset + n}" + "y" * 50, "offset": offset + n, "cell": DELETED} for n in range(64)
            ]
            replica.apply(batch_of(rows), {0: (offset, offset + 64)}, {0: stable}, 5)

        offset = 100
        with pytest.raises(StoreFull):  # noqa: PT012 - so many that they do not fit
            while offset < 100_000:
                delete(offset, 0)
                offset += 64
        before = replica.store.statistics()["remembered"]
        with pytest.raises(StoreFull):
            delete(offset, offset)
        delete(offset, offset)
        assert replica.store.statistics()["remembered"] == 64 < before
        assert replica.watermarks[0] == offset + 64

    def test_a_joining_worker_claims_nothing_before_its_base(self) -> None:
        joining = {ME: "joining", PEER: "active"}
        replica = replica_of(members=joining, serving={0: (PEER,)}, moving=True)
        replica.apply(None, {0: (300, 310)}, {}, 5)
        assert replica.watermarks == {0: 0, 1: 0}
        replica.adopt(state_of(epoch=6), {0: 305, 1: 7})
        assert replica.watermarks == {0: 310, 1: 7}
        assert replica.store.view.stamp == {0: 310, 1: 7}

    def test_a_base_below_what_was_applied_takes_nothing_back(self) -> None:
        replica = replica_of()
        replica.apply(None, {0: (100, 200)}, {}, 5)
        replica.adopt(state_of(epoch=6), {0: 150})
        assert replica.watermarks[0] == 200


class TestFence:
    def test_an_older_epoch_is_refused_and_leaves_no_trace(self) -> None:
        replica = replica_of()
        assert send(replica, 100, epoch=4) is None
        assert (replica.store.view.rows, replica.watermarks[0]) == (0, 100)
        assert send(replica, 100, epoch=7) is not None
        assert replica.fence == 7
        assert send(replica, 101, epoch=6) is None
        assert replica.watermarks[0] == 101

    def test_a_state_raises_the_fence_and_never_lowers_it(self) -> None:
        replica = replica_of()
        send(replica, 100, epoch=9)
        replica.adopt(state_of(epoch=8))
        assert (replica.fence, replica.state.epoch) == (9, 8)
        replica.adopt(state_of(epoch=11))
        assert replica.fence == 11
        assert send(replica, 101, epoch=10) is None

    def test_reads_of_an_older_epoch_go_on_where_nothing_has_gone(self) -> None:
        replica = replica_of()
        replica.adopt(state_of(epoch=6, members={ME: "active"}, copies={0: (ME,)}, serving={0: (ME,)}))
        assert (replica.fence, replica.readable_from) == (6, 5), "another worker was lost"
        send(replica, 100, epoch=8)
        assert replica.readable_from == 8, "nobody knows yet what is in that state"
        replica.adopt(state_of(epoch=7))
        assert replica.readable_from == 8
        replica.adopt(state_of(epoch=8))
        assert (replica.fence, replica.readable_from) == (8, 5)
        replica.adopt(state_of(epoch=9, copies={0: (ME, PEER)}, serving={0: (PEER,)}))
        assert replica.readable_from == 9, "it is not complete any more"
        replica.adopt(state_of(epoch=10))
        assert replica.readable_from == 9
        replica.adopt(state_of(epoch=11, incarnation=1))
        assert replica.readable_from == 11
        replica.close()
        assert replica.readable_from > 10**9

    def test_an_older_state_is_not_taken_over(self) -> None:
        replica = replica_of()
        newest = replica.state
        replica.adopt(state_of(epoch=4, copies={0: (PEER,)}), {0: 10_000})
        assert replica.state is newest
        assert replica.watermarks[0] == 100

    def test_a_new_incarnation_begins_empty(self) -> None:
        replica = replica_of()
        send(replica, 100)
        send(replica, 101, epoch=8)
        replica.adopt(state_of(epoch=9, incarnation=1, source=Source("b", "docs", 2, "json", {0: 40})))
        assert replica.store.view.rows == 0
        assert replica.watermarks == {0: 40, 1: 0}
        assert replica.store.view.stamp == {0: 40, 1: 0}
        assert send(replica, 102, epoch=8) is None
        assert send(replica, 40, epoch=9) is not None


class TestCells:
    def test_rows_of_others_are_dropped_once_nothing_moves(self) -> None:
        replica = replica_of(copies={0: (ME,), 1: (ME,)}, serving={0: (ME,), 1: (ME,)})
        send(replica, 100, cell=0)
        send(replica, 101, cell=1)
        copies = {0: (ME,), 1: (PEER,)}
        replica.adopt(state_of(epoch=6, copies=copies, serving=copies, moving=True))
        assert replica.let_go() == 0
        assert replica.store.cell_sizes() == {0: 1, 1: 1}
        replica.adopt(state_of(epoch=7, copies=copies, serving=copies))
        assert replica.let_go(1) == 1
        assert replica.store.cell_sizes() == {0: 1}

    @pytest.mark.parametrize(("moving", "epoch", "remembered"), [(False, 5, 0), (True, 5, 5000), (False, 6, 5000)])
    def test_deletions_are_forgotten_only_while_nothing_moves(self, moving: bool, epoch: int, remembered: int) -> None:
        replica = replica_of(moving=moving)
        deletes = batch_of([{"id": f"r{n}", "offset": 100 + n, "cell": DELETED} for n in range(5000)])
        replica.store.apply(deletes)
        replica.apply(None, {0: (100, 5100)}, {0: 5100}, epoch)
        assert replica.store.statistics()["remembered"] == remembered


class TestWait:
    async def test_what_is_there_needs_no_waiting(self) -> None:
        await replica_of().wait({0: 100}, 0.0)
        await replica_of().wait({}, 0.0)

    async def test_it_wakes_when_the_last_hole_is_filled(self) -> None:
        replica = replica_of()
        waiting = asyncio.create_task(replica.wait({0: 102, 1: 1}, 5.0))
        for offset, partition in ((101, 0), (0, 1), (100, 0)):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not waiting.done()
            send(replica, offset, partition=partition)
        await asyncio.wait_for(waiting, 1.0)

    async def test_it_wakes_at_a_base(self) -> None:
        replica = replica_of(members={ME: "joining"}, moving=True)
        waiting = asyncio.create_task(replica.wait({0: 50}, 5.0))
        await asyncio.sleep(0)
        replica.adopt(state_of(epoch=6), {0: 60})
        await asyncio.wait_for(waiting, 1.0)

    async def test_it_says_what_was_missing(self) -> None:
        replica = replica_of()
        replica.apply(None, {0: (100, 120)}, {}, 5)
        missing = "'docs': tcp://me:1 .* 0.02 s (topic partition 0: 120 of 130, topic partition 3: 0 of 4);"
        with pytest.raises(ConsistencyTimeout, match=re.escape(missing).replace(r"\.\*", ".*")) as caught:
            await replica.wait({3: 4, 0: 130, 1: 0}, 0.02)
        assert "topic partition 1" not in str(caught.value)
        assert not replica._waiters, "a wait that is over is remembered"

    async def test_a_wait_that_is_cancelled_is_forgotten(self) -> None:
        replica = replica_of()
        waiting = asyncio.create_task(replica.wait({0: 200}, 5.0))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert not replica._waiters
        replica.apply(None, {0: (100, 200)}, {}, 5)


def test_status_is_plain() -> None:
    replica = replica_of(members={ME: "joining"}, moving=True)
    send(replica, 3, partition=1)
    told = replica.status()
    assert (told["address"], told["state"], told["epoch"], told["rows"]) == (ME, "joining", 5, 1)
    assert told["watermarks"] == [[0, 0], [1, 0]]
