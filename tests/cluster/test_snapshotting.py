"""Taking and loading snapshots, with workers that are only played and a place that is a folder."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headrace.cluster.coordinator import Coordinator, CoordinatorSettings
from headrace.cluster.manifests import Manifest, manifest_of
from headrace.cluster.snapshot_owner import check_mark, claim, end, folder_for, read_mark
from headrace.cluster.snapshot_settings import SnapshotSettings, entries_at
from headrace.cluster.snapshot_state import Restoring, Snapshots
from headrace.cluster.snapshots import choose, next_id, owner
from headrace.cluster.snapshotting import Taking, _finish
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.gpu.errors import CollectionNotFound, HeadraceError, SnapshotDamaged, SnapshotError, StaleEpoch, StoreFull
from headrace.gpu.snapshot_place import Place
from headrace.gpu.snapshot_wire import MomentFile, Part, SegmentFile
from headrace.pipeline.summary import summarise
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
    for segment in part.segments:
        index = Path(message["url"]) / segment.path / "index"
        index.parent.mkdir(parents=True, exist_ok=True)
        index.write_bytes(bytes(segment.bytes))
    return part


def slowly(may_end: asyncio.Event) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
    """A worker that has its part written only then."""

    async def write(message: dict[str, Any]) -> dict[str, Any]:
        await may_end.wait()
        return {"part": written(message).to_wire()}

    return write


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
        async with running(workers, A, replicas=1) as coordinator:
            workers.instead[A, "snapshot"] = slowly(may_end)
            first = asyncio.ensure_future(coordinator.snapshots.take(str(tmp_path)))
            await until(lambda: "snapshot" in [op for _, op, _ in workers.asked], "the first has begun")
            with pytest.raises(SnapshotError, match="is being written"):
                await coordinator.snapshots.take(str(tmp_path / "elsewhere"))
            may_end.set()
            await first
            await coordinator.snapshots.take(str(tmp_path))

    async def test_a_scheduled_one_is_waited_for(self, tmp_path: Path) -> None:
        workers, may_end = Writers(), asyncio.Event()
        async with running(workers, A, replicas=1) as coordinator:
            workers.instead[A, "snapshot"] = slowly(may_end)
            await coordinator.snapshots.schedule(str(tmp_path), 600.0, 0)
            await until(lambda: "snapshot" in [op for _, op, _ in workers.asked], "the scheduled one has begun")
            asked = asyncio.ensure_future(coordinator.snapshots.take(str(tmp_path)))
            await asyncio.sleep(0)
            may_end.set()
            told = await asyncio.wait_for(asked, 20)
        assert [entry.snapshot for entry in entries_at(str(tmp_path), {})][1:] == [told["snapshot"]]

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

    async def test_two_that_begin_at_the_same_place_at_once(self, tmp_path: Path) -> None:
        """Neither sees the other before both have written: the newer one stays, and the older one leaves nothing."""
        mine, others = Writers(), Writers()
        async with running(mine, A, replicas=1) as one, running(others, A, replicas=1) as other:
            other.state = other.state.with_(spec=replace(other.state.spec, uid="u2"))

            async def overtaken(message: dict[str, Any]) -> dict[str, Any]:
                for _ in range(2):
                    await other.snapshots.take(message["url"])
                return {"part": written(message).to_wire()}

            mine.instead[A, "snapshot"] = overtaken
            with pytest.raises(SnapshotError, match="began to write"):
                await one.snapshots.take(str(tmp_path), keep=1)
            there = entries_at(str(tmp_path), {})
            assert [entry.manifest.state.spec.uid for entry in there if entry.manifest] == ["u2", "u2"]
            moments = {folder.name for folder in (tmp_path / "moments").iterdir()}
            assert moments == {entry.snapshot for entry in there}, "the refused one has left something"

    async def test_one_that_is_taken_over_deletes_nothing_there(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, replicas=1) as coordinator:
            for _ in range(3):
                await coordinator.snapshots.take(str(tmp_path))
            heir = replace(coordinator.state.spec, uid="u2")
            known = replace(coordinator.state.snapshots, heir_of="u1")
            old, coordinator.state = coordinator.state, coordinator.state.with_(spec=heir, snapshots=known)
            newest = await coordinator.snapshots.take(str(tmp_path))
            coordinator.state = old
            coordinator.snapshots._give_up(str(tmp_path), 1, "u1")
            assert len(entries_at(str(tmp_path), {})) == 4
            with pytest.raises(SnapshotError, match=f"which took snapshot {newest['snapshot']} there"):
                await coordinator.snapshots.take(str(tmp_path))
            assert "--take-over" in coordinator.state.snapshots.failed, "status does not say so"

    async def test_a_worker_that_hangs_is_not_waited_for(self, tmp_path: Path) -> None:
        workers, never = Writers(), asyncio.Event()

        async def hangs(message: dict[str, Any]) -> dict[str, Any]:
            await never.wait()
            raise AssertionError("it hangs for ever")

        async with running(workers, A, B) as coordinator:
            workers.instead[A, "snapshot"] = workers.instead[B, "snapshot"] = hangs
            taking = asyncio.ensure_future(coordinator.snapshots.take(str(tmp_path)))
            await until(lambda: bool(workers.times("snapshot")), "one is writing")
            [hung] = workers.times("snapshot")
            workers.instead.clear()
            workers.away.add(hung)
            coordinator.suspect(hung, "it does not answer")
            told = await asyncio.wait_for(taking, 20.0)
            assert told["rows"] == 3
            assert hung not in coordinator.state.members
            assert len(workers.times("snapshot")) == 2
            parts = [message["part"] for _, op, message in workers.asked if op == "snapshot"]
            assert len(set(parts)) == 2, "who hangs may write its part after all, over that of whoever stood in"

    async def test_one_that_is_lost_but_does_not_write_stops_nothing(self, tmp_path: Path) -> None:
        workers, may_end = Writers(), asyncio.Event()

        async def slowly(message: dict[str, Any]) -> dict[str, Any]:
            await may_end.wait()
            return {"part": written(message).to_wire()}

        async with running(workers, A, B) as coordinator:
            workers.instead[A, "snapshot"] = workers.instead[B, "snapshot"] = slowly
            taking = asyncio.ensure_future(coordinator.snapshots.take(str(tmp_path)))
            await until(lambda: bool(workers.times("snapshot")), "one is writing")
            [writing] = workers.times("snapshot")
            [other] = {A, B} - {writing}
            coordinator.worker_left(other)
            await until(lambda: other not in coordinator.state.members and not coordinator.state.moving, "it is gone")
            may_end.set()
            await asyncio.wait_for(taking, 20.0)
            assert workers.times("snapshot") == [writing]

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

    async def test_a_collection_of_the_same_name_gets_a_folder_of_its_own(self, tmp_path: Path) -> None:
        """The one before was dropped: its snapshots stay where they are, and those of the new one go on beside them."""
        settings = replace(SETTINGS, snapshots=SnapshotSettings(url=str(tmp_path), every=600.0, keep=1))
        workers = Writers()
        async with running(workers, A, replicas=1) as before:
            kept = await before.snapshots.take(str(tmp_path / "docs"))
            await before.snapshots.end()
            mark = read_mark(Place(str(tmp_path / "docs")))
            assert mark is not None
            assert (mark.uid, mark.ended) == ("u1", True)
        spec = CollectionSpec("docs", dim=2, replicas=1, uid="u2" + "0" * 30)
        after = Coordinator(spec, workers.call, settings)
        after.start({A})
        try:
            await asyncio.wait_for(after.ready.wait(), 5.0)
            await after.attach(SOURCE)
            await until(lambda: after.state.snapshots.last != "", "its own is taken", deadline=20.0)
            assert after.state.snapshots.last_url == str(tmp_path / "docs~u2000000")
            assert folder_for(after.state.snapshots.url, {}, before.state) == str(tmp_path / "docs~u1")
            assert after.state.snapshots.url == after.state.snapshots.last_url, "status shows another place"
            assert after.state.snapshots.failed == ""
        finally:
            await after.close()
        assert [entry.snapshot for entry in entries_at(str(tmp_path / "docs"), {})] == [kept["snapshot"]]

    async def test_dropping_what_was_only_a_copy_ends_nothing(self, tmp_path: Path) -> None:
        workers = Writers()
        async with running(workers, A, replicas=1) as coordinator:
            await coordinator.snapshots.take(str(tmp_path))
            own = coordinator.state
            coordinator.state = own.with_(spec=replace(own.spec, uid="u2"))
            await coordinator.snapshots.end()
            mark = read_mark(Place(str(tmp_path)))
            assert mark is not None
            assert not mark.ended
            (tmp_path / "owner.json").unlink()
            await coordinator.snapshots.end()
            assert read_mark(Place(str(tmp_path))) is None, "the newest manifest says whose it is"
            coordinator.state = coordinator.state.with_(snapshots=replace(own.snapshots, heir_of="u1"))
            await coordinator.snapshots.end()
            mark = read_mark(Place(str(tmp_path)))
            assert mark is not None
            assert mark.ended
            # One that is brought back, and written to again, has not ended.
            await coordinator.snapshots.take(str(tmp_path))
            mark = read_mark(Place(str(tmp_path)))
            assert mark is not None
            assert (mark.uid, mark.ended) == ("u2", False)

    async def test_rows_that_never_change_are_written_once(self, tmp_path: Path) -> None:
        settings = replace(SETTINGS, snapshots=SnapshotSettings(url=str(tmp_path), every=0.01))
        workers = Writers()
        coordinator = Coordinator(CollectionSpec("docs", dim=2, replicas=1, uid="u1"), workers.call, settings)
        coordinator.state = coordinator.state.with_(snapshots=Snapshots(detached=True))
        coordinator.start({A})
        try:
            await until(lambda: coordinator.state.snapshots.last != "", "it is written", deadline=20.0)
            assert not coordinator.snapshots._due(coordinator.state.snapshots.tried_at + 3600.0)
        finally:
            await coordinator.close()


class TestTwoAtOnePlace:
    """Two that know nothing of each other, one of which does all it has to do at some moment of the other."""

    def taking(self, uid: str, heir_of: str = "") -> Taking:
        state = CollectionState(CollectionSpec("docs", dim=2, uid=uid), first_codebook(2), source=SOURCE)
        lineage = heir_of or uid

        class Alone:
            def __init__(self) -> None:
                self.state = state.with_(snapshots=Snapshots(lineage=lineage, heir_of=heir_of))

        return Taking(Alone(), Writers().call, SnapshotSettings())  # type: ignore[arg-type]

    def whole(self, taking: Taking, url: str, using: tuple[SegmentFile, ...] = ()) -> str:
        """A snapshot as `Taking` takes it, but in one thread; gives its name, or "" where it is refused."""
        return self.begun(taking, url, using)()

    def begun(self, taking: Taking, url: str, using: tuple[SegmentFile, ...] = ()) -> Callable[[], str]:
        """As `whole`, up to the manifest; what is given does the rest."""
        state = taking._owner.state
        try:
            entries = claim(url, {}, state)
        except SnapshotError:
            return lambda: ""
        snapshot = next_id(entries, 1e9, state.spec.uid)
        part = written({"snapshot": snapshot, "part": "part-0", "url": url})
        parts = {A: replace(part, segments=(*part.segments, *using))}
        manifest = manifest_of(state, snapshot, parts, lineage=state.lineage, created=1e9, seconds=0.0)

        def rest() -> str:
            try:
                _finish(Place(url), manifest, state)
                taking._check_alone(url, entries)
            except SnapshotError:
                taking._leave_nothing(url, snapshot)
                return ""
            return snapshot

        return rest

    def interrupting(self, monkeypatch: pytest.MonkeyPatch, at: int, what: Callable[[], Any]) -> list[int]:
        """Have `what` done when a place is used for the time number `at`; counts the uses."""
        uses = [0]

        def hooked(method: Any) -> Any:
            def use(*args: Any, **kwargs: Any) -> Any:
                uses[0] += 1
                if uses[0] == at:
                    what()
                return method(*args, **kwargs)

            return use

        for name in ("read", "names", "sizes", "new"):
            monkeypatch.setattr(Place, name, hooked(getattr(Place, name)))
        return uses

    @pytest.mark.parametrize(
        ("first", "second", "keep", "half"),
        [("u1", "u2", 0, False), ("u2", "u1", 1, False), ("u1", "u2", 1, True), ("u2", "u1", 0, True)],
    )
    def test_of_two_new_collections_one_gets_the_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str, keep: int, half: bool
    ) -> None:
        """The second does all it does at some moment of the first; or `half` of it, and the rest afterwards."""
        at, wins = 0, set()
        while True:
            at += 1
            url = str(tmp_path / f"docs{at}")
            one, other = self.taking(first), self.taking(second)
            left: list[Callable[[], str]] = []

            def others(other: Taking = other, url: str = url, left: list[Any] = left) -> None:
                left.append(self.begun(other, url))
                if not half:
                    left.pop()()
                    other._give_up(url, keep, second)

            with monkeypatch.context() as patched:
                uses = self.interrupting(patched, at, others)
                self.whole(one, url)
                one._give_up(url, keep, first)
            for rest in left:
                rest()
            there = entries_at(url, {})
            assert len({entry.manifest.lineage for entry in there if entry.manifest}) == len(there) <= 1
            for entry in there:
                assert entry.manifest is not None
                assert self.complete(url, entry.manifest), f"something was swept away at use {at}"
                wins.add(entry.manifest.lineage)
            # Whatever came of it, one of them can go on.
            assert bool(self.whole(self.taking("u1"), url)) + bool(self.whole(self.taking("u2"), url)) == 1
            if uses[0] < at:
                break
        assert at > 10, "nothing was interrupted"
        assert wins == {"u1", "u2"}, "neither order is tried"

    def test_an_heir_loses_nothing_to_the_retention_of_whom_it_follows(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        at = taken = 0
        while True:
            at += 1
            url = str(tmp_path / f"docs{at}")
            old, heir = self.taking("u1"), self.taking("u2", heir_of="u1")
            self.whole(old, url)
            first = entries_at(url, {})[0].manifest
            assert first is not None
            self.whole(old, url)
            done: list[str] = []

            def takes(heir: Taking = heir, url: str = url, first: Any = first, done: list[str] = done) -> None:
                done.append(self.whole(heir, url, using=first.parts[0].segments))

            with monkeypatch.context() as patched:
                uses = self.interrupting(patched, at, takes)
                self.whole(old, url)
                old._give_up(url, 1, "u1")
            newest = owner(entries_at(url, {}))
            assert newest is not None
            assert self.complete(url, newest), f"something was swept away at use {at}"
            if done and done[0]:
                taken += 1
                assert newest.lineage == "u1"
            if uses[0] < at:
                break
        assert taken > 3

    def complete(self, url: str, manifest: Manifest) -> bool:
        place = Place(url)
        files = [part.moment.path for part in manifest.parts]
        files += [f"{segment.path}/index" for part in manifest.parts for segment in part.segments]
        return all(place.read(file) is not None for file in files)

    def test_a_mark_that_means_nothing_keeps_nobody_away(self, tmp_path: Path) -> None:
        (tmp_path / "owner.json").write_text("[" * 100_000)
        assert read_mark(Place(str(tmp_path))) is None
        assert self.whole(self.taking("u1"), str(tmp_path))
        mark = read_mark(Place(str(tmp_path)))
        assert mark is not None
        assert (mark.uid, mark.collection, mark.ended) == ("u1", "docs", False)

    def test_one_that_was_dropped_meanwhile_leaves_no_snapshot(self, tmp_path: Path) -> None:
        taking, url = self.taking("u1"), str(tmp_path)
        self.whole(taking, url)
        assert end(url, {}, taking._owner.state)
        with pytest.raises(SnapshotError, match="was dropped while"):
            check_mark(Place(url), taking._owner.state)
        manifest = entries_at(url, {})[0].manifest
        assert manifest is not None
        with pytest.raises(SnapshotError, match="was dropped while"):
            _finish(Place(url), manifest, taking._owner.state)


class TestUnreadable:
    """A manifest that cannot be read stands in nobody's way."""

    def test_it_is_listed_and_the_others_are_used(self, tmp_path: Path) -> None:
        taking = TestTwoAtOnePlace().taking("u1")
        good = TestTwoAtOnePlace().whole(taking, str(tmp_path))
        (tmp_path / "snapshots" / "000002-folder.json").mkdir()
        (tmp_path / "snapshots" / "000003-deep.json").write_text("[" * 100_000)
        found = entries_at(str(tmp_path), {})
        assert [entry.snapshot for entry in found] == [good, "000002-folder", "000003-deep"]
        assert "000002-folder.json" in found[1].problem
        assert "RecursionError" in found[2].problem
        manifest, passed_over = choose(found)
        assert (manifest.snapshot, len(passed_over)) == (good, 2)
        # What cannot be read may be good, and is not deleted; nor is anything that it may name.
        fourth = TestTwoAtOnePlace().whole(taking, str(tmp_path))
        taking._give_up(str(tmp_path), 1, "u1")
        assert [entry.snapshot for entry in entries_at(str(tmp_path), {})] == ["000002-folder", fourth]
        assert (tmp_path / "moments" / good).exists()

    def test_a_place_that_gives_nothing_is_away(self, tmp_path: Path) -> None:
        (tmp_path / "snapshots" / "000002-folder.json").mkdir(parents=True)
        with pytest.raises(SnapshotError, match="000002-folder"):
            entries_at(str(tmp_path), {})


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

    async def test_whoever_waits_for_one_that_is_dropped_is_told(self, tmp_path: Path) -> None:
        workers, never = Writers(), asyncio.Event()

        async def hangs(message: dict[str, Any]) -> dict[str, Any]:
            await never.wait()
            raise AssertionError("it was dropped")

        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path))
            workers.instead[C, "load"] = hangs
            fresh = restoring(workers, taken, tmp_path)
            fresh.start({C})
            waiting = asyncio.ensure_future(fresh.loading.restored())
            await until(lambda: (C, "load") in [(w, op) for w, op, _ in workers.asked], "C is loading")
            await fresh.close()
            with pytest.raises(CollectionNotFound, match="was dropped"):
                await asyncio.wait_for(waiting, 5.0)

    async def test_one_whose_asker_has_gone_says_why_it_waits_and_tries_again(self, tmp_path: Path) -> None:
        """The scheduler was lost while it was loaded, and the place is away when the next one begins."""
        workers = Writers()
        settings = replace(SETTINGS, snapshots=replace(SETTINGS.snapshots, pause=0.05))
        async with running(workers, A, B) as taken:
            await taken.snapshots.take(str(tmp_path / "docs"))
            fresh = restoring(workers, taken, tmp_path / "docs")
            fresh.start({A, B})
            await asyncio.wait_for(fresh.loading.restored(), 5.0)
            half = next(state for state in workers.states(A) if state.restoring)
            await fresh.close()
            (tmp_path / "docs").rename(tmp_path / "aside")
            next_one = Coordinator(half.spec, workers.call, settings)
            next_one.state = half.with_(epoch=half.epoch + 16)
            next_one.resume({A, B}, ())
            await until(lambda: next_one.state.snapshots.obstacle != "", "it says why")
            [note] = [note for note in summarise(next_one.state, [], [])["notes"] if "is being loaded" in note]
            assert "there is no snapshot" in note
            assert "drop the collection" in note
            (tmp_path / "aside").rename(tmp_path / "docs")
            await until(lambda: settled(next_one), "it is loaded", deadline=20.0)
            assert next_one.state.spec.uid == "u2"
            await next_one.close()


class TestLoss:
    async def test_a_newer_one_that_cannot_be_read_just_now_is_waited_for(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        workers, read, away = Writers(), Place.read, [5]
        async with running(workers, A, B) as coordinator:
            await coordinator.snapshots.take(str(tmp_path))
            newer = await coordinator.snapshots.take(str(tmp_path))

            def sometimes(place: Place, path: str) -> bytes | None:
                if newer["snapshot"] in path and away[0]:
                    away[0] -= 1
                    raise SnapshotError("input/output error")
                return read(place, path)

            monkeypatch.setattr(Place, "read", sometimes)
            coordinator.loading._settings = replace(coordinator.loading._settings, patience=60.0)
            await self.lost(workers, coordinator)
            assert workers.loads() == [(C, newer["snapshot"])]

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
