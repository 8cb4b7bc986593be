"""Collections that are written to a folder and come back: on other workers, behind newer records, or not at all."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import pytest

import headrace
from headrace.cluster.manifests import read_manifest
from headrace.gpu.errors import (
    ClusterError,
    CollectionError,
    CollectionExists,
    ConfigError,
    EncoderError,
    SnapshotError,
    TopicError,
)
from headrace.gpu.snapshot_place import Place
from headrace.pipeline import cli_snapshot, snapshot_client
from headrace.pipeline.cli import main
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker

DIM = 8
ROWS = 1000
SMALL = {"headrace.store.seal-rows": 200, "headrace.codebook.min-rows": 500, "headrace.store.settle-after": "1h"}


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=DIM).astype(np.float32)


def rows(first: int, count: int, *, shift: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": f"r{number}", "vector": vector(number + shift), "n": number + shift}
        for number in range(first, first + count)
    ]


def held(collection: Collection) -> dict[Any, tuple[int, int, Any]]:
    """What the collection holds: id to version and an attribute."""
    return {row.id: (row.topic_partition, row.offset, row.attributes.get("n")) for row in collection.scan()}


def until(condition: Callable[[], Any], what: str, deadline: float = 60.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"after {deadline:g} s still not: {what}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def two() -> Iterator[Database]:
    with dask.config.set(SMALL), headrace.connect(workers=2, backend="host") as running:
        yield running


@pytest.fixture(scope="module")
def three() -> Iterator[Database]:
    with dask.config.set(SMALL), headrace.connect(workers=3, backend="host") as running:
        yield running


@pytest.fixture(scope="module")
def docs(two: Database, broker: EmbeddedBroker) -> Collection:
    """A collection of several cells, with sealed and growing rows; every test may write to it."""
    broker.create_topic("kept", 4)
    collection = two.create_collection("kept", dim=DIM, cells=6)
    collection.ingest(broker.bootstrap)
    collection.upsert(rows(0, ROWS), wait="searchable", deadline=60.0)
    until(lambda: (now := collection.status())["codebook"] == 1 and not now["moving"], "the codebook is trained")
    return collection


@pytest.fixture
def copies(three: Database) -> Iterator[Database]:
    """Where they come back: on another number of workers."""
    yield three
    for name in three.collections():
        three.drop_collection(name)


class TestRestoring:
    def test_on_another_number_of_workers_and_behind_newer_records(
        self, docs: Collection, copies: Database, tmp_path: Path
    ) -> None:
        count = docs.count()
        taken = docs.snapshot(str(tmp_path))
        assert (taken.rows, taken.collection, taken.url) == (count, docs.name, str(tmp_path))
        docs.upsert(rows(100, 100, shift=7), wait="searchable")
        docs.delete([f"r{number}" for number in range(60)], wait="searchable")
        told = copies.restore(str(tmp_path))
        back = copies.collection(docs.name)
        assert held(back) == held(docs)
        assert len(told.workers) == 3
        assert told.replayed == 160
        assert told.catch_up_seconds is not None
        assert sum(one.rows for one in told.workers) == 2 * count, "two copies of each row"
        assert sum(one.adopted + one.rebuilt for one in told.workers) > 0, "nothing was sealed: the test shows little"
        verified = back.verify(deep=True)
        assert verified.ok, verified
        assert (back.status()["state"], back.status()["alarms"]) == ("healthy", [])
        hits = back.search(vector(100 + 7), limit=1, consistency="strong")
        assert hits[0].id == "r100"
        back.upsert(rows(5, 1), wait="searchable")
        assert back.get(["r5"])[0] is not None

    def test_what_settled_is_written_once(self, docs: Collection, tmp_path: Path) -> None:
        first = docs.snapshot(str(tmp_path))
        docs.upsert(rows(ROWS, 10), wait="searchable")
        second = docs.snapshot(str(tmp_path))
        assert first.bytes_written == first.bytes
        assert second.bytes_written < second.bytes / 2
        assert [one.name for one in docs.snapshots()] == [first.name, second.name]
        assert second.rows == docs.count()

    def test_a_copy_that_was_restored_for_a_look_leaves_the_place_to_whoever_has_it(
        self, docs: Collection, copies: Database, tmp_path: Path
    ) -> None:
        docs.snapshot(str(tmp_path))
        copies.restore(str(tmp_path))
        with pytest.raises(SnapshotError, match="restore with take_over=True"):
            copies.collection(docs.name).snapshot(str(tmp_path))
        second = docs.snapshot(str(tmp_path))
        # One that was dropped here is no more, so what is made of its snapshots goes on in its place.
        copies.collection(docs.name).snapshot(str(tmp_path / "elsewhere"))
        copies.drop_collection(docs.name)
        copies.restore(str(tmp_path / "elsewhere"))
        back = copies.collection(docs.name)
        assert len([back.snapshot(str(tmp_path / "elsewhere")), *back.snapshots()]) == 3
        assert docs.snapshot(str(tmp_path)).name > second.name
        with pytest.raises(ConfigError, match="own name"):
            copies.restore(str(tmp_path), "other", take_over=True)

    def test_under_another_name_beside_the_original(self, docs: Collection, two: Database, tmp_path: Path) -> None:
        docs.snapshot(str(tmp_path))
        with pytest.raises(CollectionExists, match=docs.name):
            two.restore(str(tmp_path))
        two.restore(str(tmp_path), "again", replicas=1)
        again = two.collection("again")
        assert held(again) == held(docs)
        assert again.spec.replicas == 1
        with pytest.raises(SnapshotError, match="another collection"):
            again.snapshot(str(tmp_path))
        docs.snapshot(str(tmp_path))
        two.drop_collection("again")

    def test_a_worker_that_is_being_emptied_gets_nothing_of_it(
        self, docs: Collection, copies: Database, tmp_path: Path
    ) -> None:
        docs.snapshot(str(tmp_path))
        leaving, *others = copies.workers
        copies.drain(leaving)
        try:
            copies.restore(str(tmp_path))
            back = copies.collection(docs.name)
            assert {holder for holders in back.status()["placement"].values() for holder in holders} == set(others)
            assert held(back) == held(docs)
        finally:
            copies.drain(leaving, undo=True)

    def test_one_that_came_back_goes_on_at_the_same_place(
        self, docs: Collection, copies: Database, tmp_path: Path
    ) -> None:
        first = docs.snapshot(str(tmp_path))
        copies.restore(str(tmp_path), take_over=True)
        back = copies.collection(docs.name)
        assert [one.name for one in back.snapshots()] == [first.name]
        second = back.snapshot(str(tmp_path))
        assert second.name > first.name
        with pytest.raises(SnapshotError, match=f"which took snapshot {second.name} there"):
            docs.snapshot(str(tmp_path))
        assert "--take-over" in docs.status()["snapshots"]["failed"]
        assert [one.name for one in back.snapshots()] == [first.name, second.name]
        assert second.bytes_written < first.bytes_written, "segments that were taken over were written again"

    def test_ingest_and_reads_go_on_meanwhile(
        self, docs: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        may_write = threading.Event()
        new = Place.new
        monkeypatch.setattr(Place, "new", lambda *args, **kwargs: (may_write.wait(60), new(*args, **kwargs))[1])
        done: list[headrace.Snapshot] = []
        writing = threading.Thread(target=lambda: done.append(docs.snapshot(str(tmp_path))))
        writing.start()
        try:
            docs.upsert(rows(2 * ROWS, 20), wait="searchable")
            assert docs.search(vector(2 * ROWS + 3), limit=1)[0].id == f"r{2 * ROWS + 3}"
            until(lambda: _refused(docs, tmp_path), "a second one is refused")
            assert not done
        finally:
            may_write.set()
            writing.join()
        assert done[0].rows <= docs.count()


def _refused(docs: Collection, path: Path) -> bool:
    with pytest.raises(SnapshotError, match="is being written"):
        docs.snapshot(str(path))
    return True


class TestTruncated:
    def test_what_the_log_has_lost_since_is_told(
        self, two: Database, copies: Database, broker: EmbeddedBroker, topic: str, tmp_path: Path
    ) -> None:
        """The embedded broker keeps 5 MiB of a topic partition."""
        name = f"{topic}-small"
        broker.create_topic(name, 1)
        docs = two.create_collection(name, dim=DIM)
        docs.ingest(broker.bootstrap)
        docs.upsert(rows(0, 50), wait="searchable")
        docs.snapshot(str(tmp_path))
        noise = np.random.default_rng(0)  # which no compression makes small
        for number in range(8):
            fat = [{**row, "noise": noise.bytes(10_000).hex()} for row in rows(100 * number, 100, shift=3)]
            docs.upsert(fat, wait="searchable", deadline=60.0)
        two.drop_collection(name)
        copies.restore(str(tmp_path), deadline=60.0)
        back = copies.collection(name)
        until(lambda: back.status()["alarms"], "the alarm is there")
        (alarm,) = back.status()["alarms"]
        assert "offsets 50 to" in alarm
        assert "were deleted from the log before they were read" in alarm


class TestRefusals:
    def test_where_there_is_nothing(self, copies: Database, tmp_path: Path) -> None:
        with pytest.raises(SnapshotError, match="no snapshot that can be used"):
            copies.restore(str(tmp_path))
        assert copies.snapshots(str(tmp_path)) == []
        assert copies.collections() == []

    def test_what_cannot_be_asked(self, docs: Collection, two: Database) -> None:
        with pytest.raises(ConfigError, match="every"):
            docs.snapshot("/x", every=-1)
        with pytest.raises(ConfigError, match="keep"):
            docs.snapshot("/x", keep=-1)
        with pytest.raises(ConfigError, match=r"headrace\.snapshots\.options") as refused:
            docs.snapshot("s3://me:hush@bucket/docs")
        assert "hush" not in str(refused.value)
        with pytest.raises(ConfigError, match="url"):
            two.restore("")

    def test_a_place_that_cannot_be_written(self, docs: Collection, tmp_path: Path) -> None:
        file = tmp_path / "file"
        file.touch()
        with pytest.raises(SnapshotError, match="file"):
            docs.snapshot(str(file / "docs"))
        assert docs.status()["notes"] == [], "a mistyped place is no fault of the collection"

    def test_an_encoder_that_a_worker_lacks(self, docs: Collection, copies: Database, tmp_path: Path) -> None:
        docs.snapshot(str(tmp_path))
        (file,) = (tmp_path / "snapshots").iterdir()
        manifest = read_manifest(file.stem, file.read_bytes()).manifest
        assert manifest is not None
        spec = _with(manifest.state.spec, encoder="nosuch@1")
        file.write_bytes(_with(manifest, state=_with(manifest.state, spec=spec)).to_bytes())
        with pytest.raises(EncoderError, match="nosuch@1"):
            copies.restore(str(tmp_path))
        assert copies.collections() == []

    def test_a_topic_that_has_lost_records(
        self, docs: Collection, copies: Database, broker: EmbeddedBroker, tmp_path: Path
    ) -> None:
        docs.snapshot(str(tmp_path))
        with EmbeddedBroker() as other:
            other.create_topic(docs.name, 4)
            (file,) = (tmp_path / "snapshots").iterdir()
            manifest = read_manifest(file.stem, file.read_bytes()).manifest
            assert manifest is not None
            source = _with(manifest.state.source, bootstrap=other.bootstrap)
            file.write_bytes(_with(manifest, state=_with(manifest.state, source=source)).to_bytes())
            with pytest.raises(TopicError, match="ingest=False"):
                copies.restore(str(tmp_path))
            told = copies.restore(str(tmp_path), ingest=False)
        assert told.catch_up_seconds is None
        back = copies.collection(docs.name)
        assert held(back) == held(docs)
        with pytest.raises(CollectionError, match="restored without its topic"):
            back.ingest(broker.bootstrap, topic=docs.name)
        with pytest.raises(CollectionError, match="one snapshot is enough"):
            back.snapshot(str(tmp_path / "alone"), every=1)
        back.snapshot(str(tmp_path / "alone"))
        copies.restore(str(tmp_path / "alone"), "third")
        with pytest.raises(CollectionError, match="restored without its topic"):
            copies.collection("third").ingest(broker.bootstrap, topic=docs.name)

    def test_topics_are_told_apart(self, broker: EmbeddedBroker, topic: str, monkeypatch: pytest.MonkeyPatch) -> None:
        told = {"source": {"bootstrap": broker.bootstrap, "topic": topic, "partitions": 4}, "offsets": [[0, 0]]}
        snapshot_client.check_topic(told)
        with pytest.raises(TopicError, match="4 topic partitions and the snapshot is of 3"):
            snapshot_client.check_topic({**told, "source": {**told["source"], "partitions": 3}})
        with pytest.raises(TopicError, match="no topic 'nosuch'"):
            snapshot_client.check_topic({**told, "source": {**told["source"], "topic": "nosuch"}})
        monkeypatch.setattr(snapshot_client.Offsets, "topic_id", lambda self: "new")
        snapshot_client.check_topic(told)
        with pytest.raises(TopicError, match="made anew since the snapshot"):
            snapshot_client.check_topic({**told, "source": {**told["source"], "topic_id": "old"}})

    def test_a_broker_that_is_away_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(snapshot_client, "Offsets", partial(snapshot_client.Offsets, deadline=0.1))
        told = {"source": {"bootstrap": "127.0.0.1:9", "topic": "x", "partitions": 4}, "offsets": [[0, 0]]}
        snapshot_client.check_topic(told)


def _with(thing: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(thing, **changes)


class TestSchedule:
    def test_it_is_kept_and_old_ones_go(self, docs: Collection, tmp_path: Path) -> None:
        place = tmp_path / "docs"
        first = docs.snapshot(str(place), every=0.3, keep=2)
        assert docs.status()["snapshots"]["schedule"] == {"url": str(place), "every": 0.3, "keep": 2}
        docs.upsert(rows(3 * ROWS, 10), wait="searchable")
        until(lambda: first.name not in [one.name for one in docs.snapshots()], "the first is gone")
        docs.snapshot(str(place), every=0, keep=2)
        found = docs.snapshots(str(place))
        assert len(found) == 2
        assert not docs.status()["snapshots"]["schedule"]
        named = {
            segment.uid
            for file in (place / "snapshots").iterdir()
            if (manifest := read_manifest(file.stem, file.read_bytes()).manifest)
            for part in manifest.parts
            for segment in part.segments
        }
        assert {folder.name for folder in (place / "segments").iterdir()} == named
        assert {folder.name for folder in (place / "moments").iterdir()} == {one.name for one in found}

    def test_one_that_fails_is_told_and_the_one_before_stays(self, docs: Collection, tmp_path: Path) -> None:
        place = tmp_path / "docs"
        docs.snapshot(str(place), every=0.3)
        (place / "moments").rename(tmp_path / "aside")
        (place / "moments").touch()  # a file: no part can be written below it
        until(lambda: docs.status()["snapshots"]["failed"], "a scheduled one has failed")
        assert "the last snapshot failed" in docs.status()["notes"][0]
        good = docs.status()["snapshots"]["last"]
        assert good["name"] in [one.name for one in docs.snapshots()]
        (place / "moments").unlink()
        (tmp_path / "aside").rename(place / "moments")
        until(lambda: not docs.status()["snapshots"]["failed"], "the next one is taken")
        docs.snapshot(str(place), every=0)


class TestLoss:
    def test_all_workers_gone_and_back(self, broker: EmbeddedBroker, topic: str, tmp_path: Path) -> None:
        settings = {**SMALL, "headrace.scheduler.grace": "100ms"}
        with dask.config.set(settings), headrace.connect(workers=2, backend="host") as db:
            docs = db.create_collection(topic, dim=DIM, cells=6)
            docs.ingest(broker.bootstrap)
            docs.upsert(rows(0, ROWS), wait="searchable", deadline=60.0)
            until(lambda: not docs.status()["moving"] and docs.status()["codebook"], "the codebook is trained")
            taken = docs.snapshot(str(tmp_path))
            docs.upsert(rows(0, 40, shift=9), wait="searchable")
            docs.delete(["r50"], wait="searchable")
            before = held(docs)
            db.dask.cluster.scale(0)
            until(lambda: not db.workers, "all are gone")
            db.dask.cluster.scale(1)
            until(lambda: docs.status()["alarms"], "the collection comes back")
            docs.count(consistency="strong", deadline=60.0)
            assert held(docs) == before
            status = docs.status()
            assert taken.name in status["alarms"][0]
            assert status["incarnation"] == 1
            read = status["ingest"]["records"] + status["ingest"]["deletes"]
            assert read <= 41, "the log was read from its start"


class TestCommands:
    def test_snapshot_list_restore(
        self,
        docs: Collection,
        two: Database,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(cli_snapshot, "connected", lambda address: nullcontext(two))
        place, count = str(tmp_path), docs.count()
        assert main(["snapshot", docs.name, place]) == 0
        capsys.readouterr()
        assert main(["snapshot", "--list", place, "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out)
        assert (told["rows"], told["problem"]) == (count, "")
        assert main(["snapshot", "--list", place]) == 0
        assert told["name"] in capsys.readouterr().out
        assert main(["snapshot", "--list", place, "--check"]) == 0
        assert "whole" in capsys.readouterr().out
        assert main(["snapshot", docs.name, place, "--check"]) == 2
        file = max((tmp_path / "segments").rglob("*"), key=lambda file: file.stat().st_size)
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert [one.problem for one in docs.snapshots(place)] == [""], "its files were read"
        [problem] = [one.problem for one in docs.snapshots(place, check=True)]
        assert file.name in problem
        capsys.readouterr()
        assert main(["snapshot", "--list", place, "--check"]) == 0
        assert "is damaged" in " ".join(capsys.readouterr().out.split())
        file.write_bytes(content)
        assert main(["restore", place]) == 1
        assert "exists already" in capsys.readouterr().err
        assert main(["restore", place, "--collection", "other"]) == 0
        shown = capsys.readouterr().out
        assert told["name"] in shown
        assert "it is up to date" in shown
        two.drop_collection("other")
        assert main(["restore", place, "--collection", "other", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["collection"] == "other"
        two.drop_collection("other")
        assert main(["snapshot", docs.name]) == 2

    def test_a_folder_of_collections_comes_back(
        self, docs: Collection, copies: Database, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        docs.snapshot(str(tmp_path / docs.name))
        (tmp_path / "broken" / "snapshots").mkdir(parents=True)
        (tmp_path / "broken" / "snapshots" / "000001-x.json").write_text("{")
        cli_snapshot.bring_back(copies, str(tmp_path))
        told = capsys.readouterr()
        assert docs.name in told.out
        assert "broken is not restored" in told.err
        assert held(copies.collection(docs.name)) == held(docs)
        cli_snapshot.bring_back(copies, str(tmp_path))
        assert docs.name not in capsys.readouterr().out, "it was there already"
        copies.drop_collection(docs.name)
        cli_snapshot.bring_back(copies, str(tmp_path))
        assert f"{docs.name} was dropped and stays so" in capsys.readouterr().out
        assert copies.collections() == []
        copies.restore(str(tmp_path / docs.name))
        back = copies.collection(docs.name)
        assert held(back) == held(docs)
        back.snapshot(str(tmp_path / docs.name))  # goes on in the place of the one that was dropped
        back.snapshot(str(tmp_path / docs.name))

    def test_of_two_folders_with_one_name_the_newest_comes_back(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        found = {"docs": [5.0, 1.0], "docs~0123": [4.0, 6.0], "docs~99": [3.0], "other": [1.0]}
        for folder in found:
            (tmp_path / folder).mkdir()
        restored: list[str] = []

        class Played:
            def collections(self) -> list[str]:
                return ["other"]

            def snapshots(self, url: str) -> list[headrace.Snapshot]:
                name = Path(url).name
                damaged = headrace.Snapshot("s9", "", url, problem="its manifest is damaged")
                return [
                    *(headrace.Snapshot(f"s{at}", name.partition("~")[0], url, created=at) for at in found[name]),
                    damaged,
                ]

            def restore(self, url: str, *, take_over: bool) -> None:
                restored.append(url)
                raise SnapshotError("not here")

        cli_snapshot.bring_back(Played(), str(tmp_path))  # type: ignore[arg-type]
        assert restored == [f"{tmp_path}/docs~0123"]
        assert "docs~0123 is not restored: not here" in capsys.readouterr().err


async def test_a_restore_that_takes_too_long_says_that_it_goes_on() -> None:
    async def late(op: str, *, deadline: float, **_: Any) -> dict[str, Any]:
        raise ClusterError("it did not answer") from TimeoutError()

    async def gone(op: str, *, deadline: float, **_: Any) -> dict[str, Any]:
        raise ClusterError("it cannot be reached") from OSError()

    with pytest.raises(ClusterError, match=r"'docs' was not loaded within .* goes on loading it"):
        await snapshot_client.load(late, "docs", time.monotonic())
    with pytest.raises(ClusterError, match="it cannot be reached"):
        await snapshot_client.load(gone, "docs", time.monotonic())
