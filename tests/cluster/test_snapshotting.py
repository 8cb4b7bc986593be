"""Taking and loading snapshots, with workers that are only played and a place that is a folder."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.snapshot_settings import SnapshotSettings, entries_at
from headrace.cluster.snapshot_state import Restoring
from headrace.cluster.state import CollectionSpec, CollectionState, Source
from headrace.gpu.errors import HeadraceError, SnapshotDamaged, SnapshotError, StaleEpoch, StoreFull
from headrace.gpu.snapshot_parts import MomentFile, Part, SegmentFile
from tests.cluster.test_coordinator import A, B, C, Played, until

SOURCE = Source("localhost:9092", "docs", 2, "json", {0: 5, 1: 0})
SETTINGS = CoordinatorSettings(
    publish_deadline=1.0, tick=0.01, min_rows=1 << 30, snapshots=SnapshotSettings(patience=0.3, gather=0.05)
)


class Writers(Played):
    """Workers that write parts that nobody reads, and load whatever they are told to."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[tuple[str, str], list[HeadraceError]] = {}
        self.damaged: dict[str, HeadraceError] = {}

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if op not in ("snapshot", "load") or (address, op) in self.instead or address in self.away:
            return await super().call(address, op, deadline=deadline, **message)
        await asyncio.sleep(0)
        self.asked.append((address, op, message))
        if waiting := self.errors.get((address, op)):
            raise waiting.pop(0)
        if op == "load":
            for part, _ in message["parts"]:
                if error := self.damaged.get(part["moment"]["path"].split("/")[1]):
                    raise error
            return {"rows": 3, "bytes": 100, "adopted": 0, "rebuilt": 0, "seconds": 0.1}
        return {"part": written(message).to_wire()}

    def loads(self) -> list[tuple[str, str]]:
        """Who was told to load what: worker and snapshot."""
        return [
            (worker, message["parts"][0][0]["moment"]["path"].split("/")[1])
            for worker, op, message in self.asked
            if op == "load" and message["parts"]
        ]


def written(message: dict[str, Any]) -> Part:
    """A part that a worker has written, or says so."""
    part = _part(message["snapshot"], message["part"])
    file = Path(message["url"]) / part.moment.path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(bytes(part.moment.bytes))
    return part


def _part(snapshot: str, name: str) -> Part:
    segment = SegmentFile(uuid.uuid4().hex, 3, 3, 100, "0" * 32)
    return Part(name, {0: 9, 1: 4}, {0: 3}, (segment,), MomentFile(f"moments/{snapshot}/{name}.npz", 10, "1" * 32), 110)


@asynccontextmanager
async def running(
    workers: Writers, *live: str, replicas: int = 2, settings: CoordinatorSettings = SETTINGS
) -> AsyncIterator[Coordinator]:
    coordinator = Coordinator(CollectionSpec("docs", dim=2, replicas=replicas, uid="u1"), workers.call, settings)
    coordinator.start(set(live))
    try:
        await asyncio.wait_for(coordinator.ready.wait(), 5.0)
        await coordinator.attach(SOURCE)
        yield coordinator
    finally:
        await coordinator.close()


def restoring(workers: Writers, taken: Coordinator, place: Path, **target: Any) -> Coordinator:
    """A coordinator that is to load what another has taken."""
    spec = replace(taken.state.spec, uid="u2")
    fresh = Coordinator(spec, workers.call, SETTINGS)
    fresh.state = fresh.state.with_(
        source=SOURCE, restoring=Restoring(str(place), "", "u1", **{"asked": True, **target})
    )
    return fresh


def settled(coordinator: Coordinator) -> bool:
    state = coordinator.state
    return state.restoring is None and bool(state.active) and not state.moving


class TestTaking:
    async def test_one_worker_that_has_everything_writes(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as coordinator:
            told = await coordinator.snapshots.take(str(tmp_path))
            again = await coordinator.snapshots.take(str(tmp_path))
            assert told["rows"] == 3
            assert told["offsets"] == [[0, 9], [1, 4]]
            assert len(set(workers.times("snapshot"))) == 1, "the second is not by whoever wrote the first"
            assert [entry.snapshot for entry in entries_at(str(tmp_path), {})] == [told["snapshot"], again["snapshot"]]
            known = coordinator.state.snapshots
            assert (known.last, known.last_url, known.lineage) == (again["snapshot"], str(tmp_path), "u1")
            told_to = [message["snapshots"]["last"] for _, op, message in workers.asked if op == "told"]
            assert told_to[-2:] == [again["snapshot"]] * 2, "the workers remember it, should this scheduler be lost"

    async def test_another_epoch_is_tried_again(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, replicas=1) as coordinator:
            workers.errors[A, "snapshot"] = [StaleEpoch("it has gone on")]
            await coordinator.snapshots.take(str(tmp_path))
            assert len(workers.times("snapshot")) == 2

    async def test_one_at_a_time(self, tmp_path: Path) -> None:
        workers, may_end = Writers(), asyncio.Event()

        async def slowly(message: dict[str, Any]) -> dict[str, Any]:
            await may_end.wait()
            return {"part": written(message).to_wire()}

        async with running(workers, A, replicas=1) as coordinator:
            workers.instead[A, "snapshot"] = slowly
            first = asyncio.ensure_future(coordinator.snapshots.take(str(tmp_path)))
            await until(lambda: "snapshot" in [op for _, op, _ in workers.asked], "the first has begun")
            with pytest.raises(SnapshotError, match="is being written"):
                await coordinator.snapshots.take(str(tmp_path / "elsewhere"))
            may_end.set()
            await first
            await coordinator.snapshots.take(str(tmp_path))

    async def test_one_that_fails_leaves_the_one_before(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, replicas=1) as coordinator:
            first = await coordinator.snapshots.take(str(tmp_path))
            workers.errors[A, "snapshot"] = [SnapshotError("the disk is full")]
            with pytest.raises(SnapshotError, match="the disk is full"):
                await coordinator.snapshots.take(str(tmp_path))
            known = coordinator.state.snapshots
            assert (known.last, known.failed) == (first["snapshot"], "the disk is full")
            assert len(entries_at(str(tmp_path), {})) == 1
            await coordinator.snapshots.take(str(tmp_path))
            assert coordinator.state.snapshots.failed == ""

    async def test_a_place_that_only_a_worker_sees(self, tmp_path: Path) -> None:
        workers = Writers()

        async def elsewhere(message: dict[str, Any]) -> dict[str, Any]:
            return {"part": _part(message["snapshot"], message["part"]).to_wire()}

        async with running(workers, A, replicas=1) as coordinator:
            workers.instead[A, "snapshot"] = elsewhere
            with pytest.raises(SnapshotError, match="not there for the scheduler"):
                await coordinator.snapshots.take(str(tmp_path))
            assert entries_at(str(tmp_path), {}) == []
            assert coordinator.state.snapshots.failed == "", "nobody expects anything there"

    async def test_another_collections_place_is_left_alone(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, replicas=1) as coordinator:
            await coordinator.snapshots.take(str(tmp_path))
            coordinator.state = coordinator.state.with_(
                spec=replace(coordinator.state.spec, uid="u9"),
                snapshots=replace(coordinator.state.snapshots, lineage=""),
            )
            with pytest.raises(SnapshotError, match="another collection"):
                await coordinator.snapshots.take(str(tmp_path))

    async def test_what_cannot_be_read_keeps_everything_but_manifests(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, replicas=1) as coordinator:
            for _ in range(2):
                await coordinator.snapshots.take(str(tmp_path))
            (tmp_path / "snapshots" / "000009-x.json").write_text("{")
            orphan = tmp_path / "segments" / uuid.uuid4().hex
            orphan.mkdir(parents=True)
            (orphan / "manifest.json").write_text("{}")
            await coordinator.snapshots.take(str(tmp_path), keep=1)
            assert len(entries_at(str(tmp_path), {})) == 1
            assert not orphan.exists(), "nothing that is damaged is left, so it can go"
            orphan.mkdir(parents=True)
            (orphan / "manifest.json").write_text("{}")
            (tmp_path / "snapshots" / "000099-x.json").write_text("{")
            await coordinator.snapshots.take(str(tmp_path), keep=2)
            assert orphan.exists(), "the damaged manifest may have named it"

    async def test_a_scheduled_one_that_nobody_foresaw_to_fail_is_not_tried_at_once(self, tmp_path: Path) -> None:
        workers = Writers()

        async def broken(message: dict[str, Any]) -> dict[str, Any]:
            raise ZeroDivisionError("a mistake of ours")

        async with running(workers, A, replicas=1) as coordinator:
            workers.instead[A, "snapshot"] = broken
            await coordinator.snapshots.schedule(str(tmp_path), 600.0, 0)
            await until(lambda: coordinator.state.snapshots.failed != "", "it has failed")
            assert "a mistake of ours" in coordinator.state.snapshots.failed
            tried = coordinator.state.snapshots.tried_at
            assert not coordinator.snapshots._due(tried + 30.0)
            assert coordinator.snapshots._due(tried + 61.0)
            assert coordinator.snapshots._due(tried - 1.0), "a clock that was set back stops it"

    async def test_the_configured_schedule(self, tmp_path: Path) -> None:
        settings = replace(SETTINGS, snapshots=SnapshotSettings(url=str(tmp_path), every=0.3, keep=2))
        workers = Writers()
        async with running(workers, A, replicas=1, settings=settings) as coordinator:
            await until(lambda: len(workers.times("snapshot")) >= 3, "three were taken")
            assert coordinator.state.snapshots.url == str(tmp_path / "docs")
            await coordinator.snapshots.schedule("", 0, 0)
            assert coordinator.state.snapshots.unscheduled
        found = entries_at(str(tmp_path / "docs"), {})
        assert 1 <= len(found) <= 3


class TestLoading:
    async def test_all_load_their_cells_and_go_on_from_there(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path))
            fresh = restoring(workers, taken, tmp_path)
            fresh.start({B, C})
            told = await asyncio.wait_for(fresh.loading.restored(), 5.0)
            assert told["snapshot"] == taken.state.snapshots.last
            assert {worker for worker, _ in told["workers"]} == {B, C}
            assert set(fresh.state.readers) == {0, 1}
            base = [message["base"] for worker, op, message in workers.asked if op == "state" and worker == C]
            assert base[-1] == [[0, 9], [1, 4]], "the log is not read from where the snapshot ends"
            first = next(state for state in workers.states(C) if state.restoring)
            assert (dict(first.readers), first.active) == ({}, ()), "somebody was read before all had loaded"
            await fresh.close()

    async def test_a_damaged_one_gives_way_to_the_one_before(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as taken:
            older = await taken.snapshots.take(str(tmp_path))
            newer = await taken.snapshots.take(str(tmp_path))
            workers.damaged[newer["snapshot"]] = SnapshotDamaged("a bit is flipped")
            fresh = restoring(workers, taken, tmp_path)
            fresh.start({A, B})
            told = await asyncio.wait_for(fresh.loading.restored(), 5.0)
            assert told["snapshot"] == older["snapshot"]
            assert newer["snapshot"] in told["passed_over"][0]
            assert "a bit is flipped" in fresh.state.alarms[0]
            incarnations = [state.incarnation for state in workers.states(A) if state.spec.uid == "u2"]
            assert incarnations[-1] > incarnations[0], "what was loaded of the damaged one is still there"
            await fresh.close()

    @pytest.mark.parametrize(
        ("error", "only"),
        [
            (SnapshotDamaged("a bit is flipped"), True),
            (StoreFull("no room"), False),
            (SnapshotError("it is not reached"), False),
        ],
    )
    async def test_whoever_asked_is_told_why_not(self, error: HeadraceError, only: bool, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path))
            newer = await taken.snapshots.take(str(tmp_path))
            workers.damaged[newer["snapshot"]] = error
            fresh = restoring(workers, taken, tmp_path, only=only)
            assert fresh.state.restoring is not None
            wanted = replace(fresh.state.restoring, snapshot=newer["snapshot"])
            fresh.state = fresh.state.with_(restoring=wanted)
            fresh.start({A, B})
            with (
                pytest.raises(type(error), match=str(error))
                if not only
                else pytest.raises(SnapshotError, match=str(error))
            ):
                await asyncio.wait_for(fresh.loading.restored(), 5.0)
            await fresh.close()

    async def test_a_worker_that_is_lost_meanwhile(self, tmp_path: Path) -> None:
        workers, may_end = Writers(), asyncio.Event()

        async def never(message: dict[str, Any]) -> dict[str, Any]:
            await may_end.wait()
            raise AssertionError("it was lost")

        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path))
            workers.instead[C, "load"] = never
            fresh = restoring(workers, taken, tmp_path)
            fresh.start({B, C})
            await until(lambda: (C, "load") in [(w, op) for w, op, _ in workers.asked], "C is loading")
            before = fresh.state.incarnation
            fresh.worker_left(C)
            await asyncio.wait_for(fresh.loading.restored(), 5.0)
            assert set(fresh.state.members) == {B}
            assert fresh.state.incarnation > before, "B may hold what it has loaded for other cells"
            await fresh.close()

    async def test_a_worker_that_comes_meanwhile_joins_afterwards(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path))
            fresh = restoring(workers, taken, tmp_path)

            async def while_told(message: dict[str, Any]) -> dict[str, Any]:
                if message["state"]["restoring"]:
                    fresh.worker_joined(C)
                return {"epoch": message["state"]["epoch"]}

            workers.instead[B, "state"] = while_told
            fresh.start({B})
            await until(lambda: settled(fresh) and set(fresh.state.members) == {B, C}, "C has joined")
            loading = {state.incarnation for state in workers.states(B) if state.restoring}
            assert loading == {fresh.state.incarnation}, "it was loaded again because somebody came"
            assert not [state for state in workers.states(C) if state.restoring]
            await fresh.close()

    async def test_what_is_scheduled_meanwhile_stays(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path / "docs"))
            fresh = restoring(workers, taken, tmp_path / "docs")
            settings = replace(SETTINGS, snapshots=SnapshotSettings(url=str(tmp_path), every=600.0))
            state, fresh = fresh.state, Coordinator(fresh.state.spec, workers.call, settings)
            fresh.state = state
            fresh.start({A, B})
            await asyncio.wait_for(fresh.loading.restored(), 5.0)
            assert fresh.state.snapshots.url == str(tmp_path / "docs")
            await fresh.close()

    async def test_a_scheduler_lost_meanwhile_begins_the_loading_again(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path))
            fresh = restoring(workers, taken, tmp_path)
            fresh.start({A, B})
            await asyncio.wait_for(fresh.loading.restored(), 5.0)
            half = next(state for state in workers.states(A) if state.restoring)
            await fresh.close()
            next_one = Coordinator(half.spec, workers.call, SETTINGS)
            next_one.state = half.with_(epoch=half.epoch + 16)
            next_one.resume({A, B}, ())
            await until(lambda: settled(next_one), "it is loaded")
            assert next_one.state.incarnation > half.incarnation
            await next_one.close()


class TestLoss:
    async def lost(self, workers: Writers, coordinator: Coordinator) -> CollectionState:
        for worker in (A, B):
            coordinator.worker_left(worker)
        await until(lambda: not coordinator.state.members, "all are gone")
        coordinator.worker_joined(C)
        await until(lambda: settled(coordinator) and C in coordinator.state.members, "it goes on", deadline=20.0)
        return coordinator.state

    async def test_the_newest_snapshot_is_loaded(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as coordinator:
            taken = await coordinator.snapshots.take(str(tmp_path))
            state = await self.lost(workers, coordinator)
            assert workers.loads() == [(C, taken["snapshot"])]
            assert taken["snapshot"] in state.alarms[0]
            assert not any("from its start" in alarm for alarm in state.alarms)
            assert state.source == SOURCE

    async def test_the_log_is_read_where_no_snapshot_can_be_used(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as coordinator:
            taken = await coordinator.snapshots.take(str(tmp_path))
            workers.damaged[taken["snapshot"]] = SnapshotDamaged("a bit is flipped")
            state = await self.lost(workers, coordinator)
            assert "from its start" in state.alarms[0]
            assert "a bit is flipped" in state.alarms[-1]
            assert set(state.readers.values()) == {C}

    async def test_a_place_that_is_away_is_tried_for_a_while(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as coordinator:
            await coordinator.snapshots.take(str(tmp_path / "docs"))
            aside = (tmp_path / "docs").rename(tmp_path / "aside")
            (tmp_path / "docs").touch()
            state = await self.lost(workers, coordinator)
            assert "no snapshot could be loaded" in state.alarms[-1]
            assert aside.exists()

    async def test_without_a_snapshot_the_log_is_read(self) -> None:
        workers = Writers()
        async with running(workers, A, B) as coordinator:
            state = await self.lost(workers, coordinator)
            assert "from its start" in state.alarms[0]
            assert workers.loads() == []

    async def test_a_snapshot_of_a_topic_that_is_gone_is_not_loaded(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, B) as coordinator:
            coordinator.state = coordinator.state.with_(source=replace(SOURCE, topic_id="old"))
            await coordinator.snapshots.take(str(tmp_path))
            coordinator.state = coordinator.state.with_(source=replace(SOURCE, topic_id="new"))
            state = await self.lost(workers, coordinator)
            assert "another topic" in state.alarms[-1]
            assert workers.loads() == []
