"""One collection's coordinator, with workers that are only played: who is told what, when, and what comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.state import CollectionSpec, CollectionState, Source
from headrace.cluster.wire import floats_to_wire, offsets_from_wire
from headrace.gpu.errors import ClusterError, CollectionError, HeadraceError, StaleEpoch, TopicError

A, B, C, D = (f"tcp://10.0.0.{number}:4000" for number in range(1, 5))
CELLS = 6
SOURCE = Source("localhost:9092", "docs", 2, "json", {0: 0, 1: 0})
QUICK = CoordinatorSettings(min_rows=100, sample_rows=50, iterations=3, publish_deadline=1.0, tick=0.01)

Answer = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]


@dataclass
class Played:
    """Workers that answer as told to; everything that was asked is kept."""

    asked: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    away: set[str] = field(default_factory=set)
    rows: int = 0
    watermarks: dict[str, dict[int, int]] = field(default_factory=dict)
    instead: dict[tuple[str, str], Answer] = field(default_factory=dict)

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        assert deadline > 0
        self.asked.append((address, op, message))
        if address in self.away:
            raise ClusterError(f"{address} did not answer {op!r}")
        if (address, op) in self.instead:
            return await self.instead[address, op](message)
        match op:
            case "state":
                return {"epoch": message["state"]["epoch"]}
            case "move":
                marks = self.watermarks.get(address, {0: 0, 1: 0})
                return {"moved": 0, "watermarks": [list(pair) for pair in marks.items()], "failed": []}
            case "status":
                return {"rows": self.rows}
            case "train":
                centroids = np.eye(message["cells"], 2, dtype=np.float32)
                return {"centroids": floats_to_wire(centroids), "rows": self.rows}
            case "reset" | "watermarks" | "told":
                return {}
        raise AssertionError(f"{op} is nothing that a coordinator asks")

    def states(self, worker: str) -> list[CollectionState]:
        """The states that a worker was sent, in order."""
        return [
            CollectionState.from_wire(message["state"])
            for address, op, message in self.asked
            if address == worker and op == "state"
        ]

    def times(self, op: str) -> list[str]:
        """Who was asked to do something."""
        return [address for address, asked, _ in self.asked if asked == op]


@asynccontextmanager
async def running(played: Played, *live: str, replicas: int = 2, attached: bool = True) -> AsyncIterator[Coordinator]:
    spec = CollectionSpec("docs", dim=2, cells=CELLS, replicas=replicas)
    coordinator = Coordinator(spec, played.call, QUICK)
    coordinator.start(set(live))
    try:
        await asyncio.wait_for(coordinator.ready.wait(), 5.0)
        if attached:
            await coordinator.attach(SOURCE)
        yield coordinator
    finally:
        await coordinator.close()


async def until(condition: Callable[[], bool], what: str, deadline: float = 5.0) -> None:
    try:
        async with asyncio.timeout(deadline):
            while not condition():
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.01)  # a state is there a moment before the first worker is told
    except TimeoutError:
        raise AssertionError(f"after {deadline:g} s still not: {what}") from None


def settled(coordinator: Coordinator, *members: str) -> Callable[[], bool]:
    def are_active() -> bool:
        state = coordinator.state
        return dict(state.members) == dict.fromkeys(members, "active") and not state.moving

    return are_active


class TestPublishing:
    async def test_a_change_is_done_only_once_everybody_has_answered(self) -> None:
        played, may_answer = Played(), asyncio.Event()

        async def slowly(message: dict[str, Any]) -> dict[str, Any]:
            await may_answer.wait()
            return {"epoch": message["state"]["epoch"]}

        async with running(played, A, B, attached=False) as coordinator:
            before = coordinator.state
            played.instead[B, "state"] = slowly
            attaching = asyncio.create_task(coordinator.attach(SOURCE))
            newer = await coordinator.newer_than(before.epoch, 1.0)
            assert newer.source == SOURCE, "whoever asks for something newer waits for the slowest worker"
            await asyncio.sleep(0.05)
            assert not attaching.done()
            may_answer.set()
            await attaching
            assert coordinator.state.epoch == before.epoch + 1

    async def test_a_collection_is_ready_once_everybody_has_answered(self) -> None:
        played, may_answer = Played(), asyncio.Event()

        async def slowly(message: dict[str, Any]) -> dict[str, Any]:
            await may_answer.wait()
            return {"epoch": message["state"]["epoch"]}

        played.instead[B, "state"] = slowly
        coordinator = Coordinator(CollectionSpec("docs", dim=2), played.call, QUICK)
        coordinator.start({A, B})
        await until(lambda: len(played.states(A)) == 1, "A is told")
        await asyncio.sleep(0.02)
        assert not coordinator.ready.is_set()
        may_answer.set()
        await asyncio.wait_for(coordinator.ready.wait(), 5.0)
        await coordinator.close()

    async def test_epochs_only_rise_and_everybody_gets_every_one(self) -> None:
        played = Played()
        async with running(played, A, B) as coordinator:
            coordinator.worker_joined(C)
            await until(settled(coordinator, A, B, C), "C is active")
            epochs = [state.epoch for state in played.states(A)]
            assert epochs == sorted(set(epochs))
            assert epochs == [state.epoch for state in played.states(B)]
            assert epochs[-1] == coordinator.state.epoch

    async def test_a_worker_that_does_not_answer_leaves(self) -> None:
        played = Played()
        async with running(played, A, B) as coordinator:
            # The first holder of the one cell is asked how many rows there are.
            asked, silent = coordinator.state.serving[0]
            played.away.add(silent)
            with pytest.raises(AssertionError, match=r"after 0\.05 s"):
                await until(settled(coordinator, asked), "nothing asked it anything", 0.05)
            coordinator.worker_joined(C)
            await until(settled(coordinator, asked, C), "it has left and C is active")
            assert silent not in {holder for holders in coordinator.state.copies.values() for holder in holders}
            assert silent not in coordinator.state.readers.values()

    async def test_waiting_for_a_newer_state_has_an_end(self) -> None:
        async with running(Played(), A) as coordinator:
            epoch = coordinator.state.epoch
            assert (await coordinator.newer_than(epoch, 0.02)).epoch == epoch
            assert (await coordinator.newer_than(epoch - 1, 5.0)).epoch == epoch


class TestJoining:
    async def test_join_move_settle(self) -> None:
        played = Played(watermarks={A: {0: 7, 1: 9}, B: {0: 8, 1: 4}})
        async with running(played, A, B) as coordinator:
            played.asked.clear()
            coordinator.worker_joined(C)
            await until(settled(coordinator, A, B, C), "C is active")
            joining, active = played.states(C)
            assert dict(joining.members) == {A: "active", B: "active", C: "joining"}
            assert joining.moving
            assert C not in joining.readers.values(), "it would read what it has not been filled with"
            assert dict(active.members) == dict.fromkeys((A, B, C), "active")
            assert not active.moving
            assert sorted(played.times("move")) == [A, B], "everybody who is active says how far it is"
            assert played.times("reset") == []
            (base,) = [
                message["base"]
                for address, op, message in played.asked
                if address == C and op == "state" and not message["state"]["moving"]
            ]
            assert offsets_from_wire(base) == {0: 7, 1: 4}, "no joining worker may claim more than every peer has"
            for address, op, message in played.asked:
                if op == "state" and address != C:
                    assert message["base"] == []

    async def test_whoever_dies_while_rows_move_is_left_out(self) -> None:
        played = Played()

        async def half(message: dict[str, Any]) -> dict[str, Any]:
            played.away.add(C)
            return {"moved": 1, "watermarks": [[0, 3]], "failed": [[C, "it hung up"]]}

        async with running(played, A, B) as coordinator:
            played.instead[A, "move"] = half
            coordinator.worker_joined(C)
            await until(lambda: C in played.away, "rows move")
            await until(settled(coordinator, A, B), "C has left again")
            assert coordinator.state.incarnation == 0
            del played.instead[A, "move"]
            played.away.clear()
            await until(settled(coordinator, A, B, C), "C answers again and joins")

    async def test_a_move_that_a_newer_change_overtook_is_done_again(self) -> None:
        played = Played()
        tries: list[int] = []

        async def stale(message: dict[str, Any]) -> dict[str, Any]:
            tries.append(message["epoch"])
            if len(tries) < 3:
                raise StaleEpoch("a newer one is known")
            return {"moved": 0, "watermarks": [[0, 1], [1, 1]], "failed": []}

        async with running(played, A, B) as coordinator:
            played.instead[B, "move"] = stale
            coordinator.worker_joined(C)
            await until(settled(coordinator, A, B, C), "C is active")
            assert len(tries) == 3
            assert coordinator.state.members[B] == "active", "it is no fault to know of something newer"

    async def test_the_last_copy_is_lost(self) -> None:
        played = Played()
        async with running(played, A, B, replicas=1) as coordinator:
            (holder,) = coordinator.state.serving[0]
            other = B if holder == A else A
            coordinator.worker_left(holder)
            await until(settled(coordinator, other), "the other has taken over")
            assert coordinator.state.incarnation == 1
            assert "read again from its start" in coordinator.state.alarms[0]
            assert set(coordinator.state.readers.values()) == {other}


class TestSuspects:
    async def test_a_suspect_begins_again_as_a_new_worker(self) -> None:
        played = Played()
        async with running(played, A, B) as coordinator:
            played.asked.clear()
            coordinator.suspect(B, "it did not answer")
            await until(lambda: "reset" in [op for _, op, _ in played.asked], "B is asked to begin again")
            await until(settled(coordinator, A, B), "B is active again")
            ops = [op for address, op, _ in played.asked if address == B]
            assert ops[0] == "reset", "what it holds is behind: no state may reach it before it has let go of that"
            assert [state.members[B] for state in played.states(B)] == ["joining", "active"]
            without = played.states(A)[0]
            assert set(without.members) == {A}
            assert without.incarnation == 0

    async def test_it_stays_away_for_as_long_as_it_does_not_answer(self) -> None:
        played = Played()
        async with running(played, A, B) as coordinator:
            played.away.add(B)
            coordinator.suspect(B, "it did not answer")
            await until(settled(coordinator, A), "B has left")
            asked = played.times("reset").count(B)
            await until(lambda: played.times("reset").count(B) >= asked + 3, "it is asked again and again")
            assert set(coordinator.state.members) == {A}
            played.away.clear()
            await until(settled(coordinator, A, B), "B is active again")
            asked = played.times("reset").count(B)
            await asyncio.sleep(0.05)
            assert played.times("reset").count(B) == asked, "it is asked to forget everything while it is needed"

    async def test_a_suspect_that_dasks_scheduler_loses_is_forgotten(self) -> None:
        played = Played()
        async with running(played, A, B) as coordinator:
            played.away.add(B)
            coordinator.suspect(B, "it did not answer")
            await until(settled(coordinator, A), "B has left")
            coordinator.worker_left(B)
            await asyncio.sleep(0.02)
            asked = played.times("reset").count(B)
            await asyncio.sleep(0.05)
            assert played.times("reset").count(B) == asked

    async def test_last_copies_are_waited_for(self) -> None:
        played = Played()
        async with running(played, A, B, replicas=1) as coordinator:
            (holder,) = coordinator.state.serving[0]
            epoch = coordinator.state.epoch
            played.away.add(holder)
            coordinator.suspect(holder, "it did not answer")
            await asyncio.sleep(0.05)
            assert coordinator.state.epoch == epoch, "rows were given up that a worker may still have"
            coordinator.worker_left(holder)
            await until(lambda: coordinator.state.incarnation == 1, "Dask says that it is dead")

    async def test_a_stranger_is_no_suspect(self) -> None:
        async with running(Played(), A, B) as coordinator:
            epoch = coordinator.state.epoch
            coordinator.suspect(D, "who is that?")
            await asyncio.sleep(0.05)
            assert coordinator.state.epoch == epoch


class TestTraining:
    async def test_a_codebook_is_adopted_once_there_are_rows(self) -> None:
        played = Played(rows=QUICK.min_rows - 1)
        async with running(played, A, B, C) as coordinator:
            await until(lambda: len(played.times("status")) > 3, "row counts are looked at")
            assert played.times("train") == []
            played.rows = QUICK.min_rows
            await until(lambda: coordinator.state.codebook.generation == 1, "a codebook is adopted")
            await until(settled(coordinator, A, B, C), "the old cells' rows have moved")
            (asked,) = [message for _, op, message in played.asked if op == "train"]
            assert (asked["cells"], asked["sample_rows"], asked["iterations"]) == (CELLS, 50, 3)
            *_, adopting, done = played.states(A)
            assert (adopting.codebook.generation, adopting.moving) == (1, True)
            assert adopting.previous is not None
            assert adopting.previous.generation == 0
            assert done.previous is None
            assert list(done.copies) == list(done.codebook.cells)
            assert all(len(holders) == 2 for holders in done.copies.values())
            holder = adopting.serving[0][0]
            moved = {
                address: list(message["cells"])
                for address, op, message in played.asked
                if op == "move" and message["epoch"] == adopting.epoch
            }
            assert moved == {worker: [0] if worker == holder else [] for worker in (A, B, C)}

    async def test_it_is_trained_once(self) -> None:
        played = Played(rows=QUICK.min_rows)
        async with running(played, A, B) as coordinator:
            await until(lambda: coordinator.state.codebook.generation == 1, "a codebook is adopted")
            await until(settled(coordinator, A, B), "the old cells' rows have moved")
            await asyncio.sleep(0.05)
            assert len(played.times("train")) == 1
            assert coordinator.state.codebook.generation == 1

    async def test_nothing_is_trained_without_a_topic(self) -> None:
        played = Played(rows=10 * QUICK.min_rows)
        async with running(played, A, B, attached=False):
            await asyncio.sleep(0.05)
            assert played.times("train") == []

    async def test_a_trainer_that_dies_is_replaced(self) -> None:
        played = Played(rows=QUICK.min_rows)
        died: list[str] = []

        def dying(worker: str) -> Answer:
            async def die(message: dict[str, Any]) -> dict[str, Any]:
                if died and died[0] != worker:
                    return {"centroids": floats_to_wire(np.eye(CELLS, 2, dtype=np.float32)), "rows": 1}
                died.append(worker)
                played.away.add(worker)
                raise ClusterError("it hung up")

            return die

        played.instead = {(worker, "train"): dying(worker) for worker in (A, B)}
        async with running(played, A, B) as coordinator:
            await until(lambda: coordinator.state.codebook.generation == 1, "a codebook is adopted")
            other = B if died == [A] else A
            await until(settled(coordinator, other), "only the other is left")
            assert coordinator.state.incarnation == 0


class TestWhatIsKept:
    async def test_the_same_topic_again_changes_nothing(self) -> None:
        async with running(Played(), A) as coordinator:
            epoch = coordinator.state.epoch
            await coordinator.attach(Source("localhost:9092", "docs", 2, "json", {0: 55, 1: 66}))
            assert coordinator.state.epoch == epoch
            assert coordinator.state.source == SOURCE, "rows below the new start would never be read again"

    @pytest.mark.parametrize(
        ("source", "kind", "says"),
        [
            (Source("localhost:9092", "other", 2, "json", {}), CollectionError, "reads topic 'docs'"),
            (Source("elsewhere:9092", "docs", 2, "json", {}), CollectionError, "from localhost:9092 already"),
            (Source("localhost:9092", "docs", 3, "json", {}), TopicError, "has 3 topic partitions"),
        ],
    )
    async def test_another_topic_is_refused(self, source: Source, kind: type[HeadraceError], says: str) -> None:
        async with running(Played(), A) as coordinator:
            with pytest.raises(kind, match=says):
                await coordinator.attach(source)
            assert coordinator.state.source == SOURCE

    async def test_a_topic_made_anew_begins_everything_again_once(self) -> None:
        one, two = (replace(SOURCE, topic_id=name) for name in ("one", "two"))
        played = Played()
        async with running(played, A, B) as coordinator:
            await coordinator.topic_found("", one)
            assert (coordinator.state.incarnation, coordinator.state.source) == (0, one)
            assert coordinator.state.alarms == ()
            await asyncio.gather(*(coordinator.topic_found("one", two) for _ in (A, B)))
            state = coordinator.state
            assert (state.incarnation, state.source) == (1, two)
            assert len(state.alarms) == 1
            assert played.states(A)[-1].incarnation == played.states(B)[-1].incarnation == 1
            await coordinator.topic_found("one", replace(SOURCE, topic_id="three"))  # of a worker that is behind
            await coordinator.topic_found("two", two)
            assert coordinator.state.source == two

    async def test_asking_for_ingest_again_finds_a_topic_that_was_made_anew(self) -> None:
        async with running(Played(), A, B) as coordinator:
            await coordinator.topic_found("", replace(SOURCE, topic_id="one"))
            wider = replace(SOURCE, topic_id="two", partitions=5, origins=dict.fromkeys(range(5), 0))
            await coordinator.attach(wider)
            assert (coordinator.state.incarnation, coordinator.state.source) == (1, wider)
            await coordinator.attach(wider)
            await coordinator.attach(replace(wider, topic_id=""))  # a broker that did not say
            assert (coordinator.state.incarnation, coordinator.state.source) == (1, wider)

    async def test_the_first_to_meet_an_attribute_decides_its_kind(self) -> None:
        async with running(Played(), A) as coordinator:
            epoch = coordinator.state.epoch
            assert await coordinator.learn({"n": "int"}) == {"n": "int"}
            assert await coordinator.learn({"n": "str", "word": "str"}) == {"n": "int", "word": "str"}
            assert coordinator.state.schema == {"n": "int", "word": "str"}
            assert coordinator.state.epoch == epoch

    async def test_an_alarm_is_kept_once(self) -> None:
        async with running(Played(), A) as coordinator:
            coordinator.alarm("offsets were lost")
            coordinator.alarm("offsets were lost")
            coordinator.worker_joined(B)
            await until(settled(coordinator, A, B), "B is active")
            assert coordinator.state.alarms == ("offsets were lost",)


class TestBalance:
    async def test_a_worker_is_emptied_and_filled_again(self) -> None:
        played = Played()
        async with running(played, A, B, C) as coordinator:
            coordinator.check_drain(B)
            coordinator.drain(B)
            await until(
                lambda: coordinator.state.leaving == (B,) and not coordinator.state.moving, "the move away is settled"
            )
            assert B not in {holder for holders in coordinator.state.copies.values() for holder in holders}
            assert settled(coordinator, A, B, C)(), "it goes on taking part"
            coordinator.drain(B, undo=True)
            await until(lambda: coordinator.state.leaving == (), "it may hold cells again")

    async def test_who_cannot_be_emptied(self) -> None:
        async with running(Played(), A, B) as coordinator:
            with pytest.raises(ClusterError, match="no worker of collection 'docs'"):
                coordinator.check_drain(D)
            coordinator.drain(A)
            with pytest.raises(ClusterError, match="the last worker that holds"):
                coordinator.check_drain(B)
            coordinator.worker_left(A)
            coordinator.worker_joined(C)
            coordinator.check_drain(B)

    @pytest.mark.parametrize(("least", "moved"), [(1000, True), (100_000, False)])
    async def test_cells_with_many_rows_are_spread(self, least: int, moved: bool) -> None:
        played = Played(rows=100)

        async def counted(_: dict[str, Any]) -> dict[str, Any]:
            state = coordinator.state
            full = [cell for cell in state.codebook.cells if state.serving[cell][0] == A]
            return {"rows": played.rows, "cell_sizes": [[cell, 900] for cell in full]}

        played.instead = {(worker, "status"): counted for worker in (A, B)}
        spec = CollectionSpec("docs", dim=2, cells=CELLS, replicas=1)
        coordinator = Coordinator(spec, played.call, replace(QUICK, survey=0.02, rebalance_rows=least))
        coordinator.start({A, B})
        try:
            await asyncio.wait_for(coordinator.ready.wait(), 5.0)
            await coordinator.attach(SOURCE)
            await until(lambda: coordinator.state.codebook.generation == 1, "there is a codebook")
            await until(lambda: not coordinator.state.moving, "it is adopted")
            before = len(played.times("move"))
            if moved:
                await until(lambda: len(played.times("move")) > before, "cells move")
            else:
                await asyncio.sleep(0.2)
                assert len(played.times("move")) == before
        finally:
            await coordinator.close()


async def test_who_joined_knows_that_it_is_complete_before_others_drop_rows() -> None:
    played = Played()
    async with running(played, A, B) as coordinator:
        coordinator.worker_joined(C)
        await until(settled(coordinator, A, B, C), "joined")
        last = [address for address, op, _ in played.asked if op == "state"][-3:]
    assert last[0] == C
    assert set(last) == {A, B, C}


class TestResuming:
    @staticmethod
    @asynccontextmanager
    async def resumed(
        played: Played, state: CollectionState, live: set[str], incomplete: set[str]
    ) -> AsyncIterator[Coordinator]:
        coordinator = Coordinator(state.spec, played.call, QUICK)
        coordinator.state = state
        coordinator.resume(live, incomplete)
        try:
            await asyncio.wait_for(coordinator.ready.wait(), 5.0)
            yield coordinator
        finally:
            await coordinator.close()

    @staticmethod
    async def before(*live: str) -> CollectionState:
        async with running(Played(), *live) as coordinator:
            return coordinator.state.with_(epoch=50)

    async def test_everybody_is_told_though_nothing_has_changed(self) -> None:
        state, played = await self.before(A, B), Played()
        async with self.resumed(played, state, {A, B}, set()) as coordinator:
            assert coordinator.state == state
            assert [s.epoch for s in played.states(A)] == [s.epoch for s in played.states(B)] == [50]
            assert not played.times("reset")

    async def test_who_has_not_returned_is_lost(self) -> None:
        state, played = await self.before(A, B), Played()
        async with self.resumed(played, state, {A}, set()) as coordinator:
            assert dict(coordinator.state.members) == {A: "active"}
            assert coordinator.state.epoch > 50
            assert coordinator.state.incarnation == 0

    async def test_who_lacks_rows_is_wiped_and_joins(self) -> None:
        state, played = await self.before(A, B), Played()
        async with self.resumed(played, state, {A, B}, {B}) as coordinator:
            await until(settled(coordinator, A, B), "both active again")
            assert played.times("reset") == [B]
            assert coordinator.state.incarnation == 0

    async def test_what_has_no_epoch_is_told_to_the_workers(self) -> None:
        played = Played()
        async with running(played, A, B) as coordinator:
            await coordinator.learn({"price": "float"})
            assert sorted(played.times("told")) == [A, B]
            coordinator.alarm("the log was cut")
            await until(lambda: len(played.times("told")) == 4, "told of the alarm")
        told = [message for _, op, message in played.asked if op == "told"]
        assert told[0]["schema"] == {"price": "float"}
        assert told[-1]["alarms"] == ["the log was cut"]
