"""The whole product on a cluster in this process: records go into Kafka, and come back out of the index."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import dask.config
import numpy as np
import pandas as pd
import pytest

import headrace
from headrace.gpu.errors import (
    BrokerError,
    ClusterError,
    CollectionError,
    CollectionExists,
    CollectionNotFound,
    ConfigError,
    EncoderError,
    HeadraceError,
    RecordError,
    TopicError,
)
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.encode import encode_binary, encode_json
from headrace.streams.producer import RecordProducer
from tests.history.checker import check_all
from tests.history.recorder import Recorder

DIM = 16

Make = Callable[..., Collection]


def vector(number: int, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(number).normal(size=dim).astype(np.float32)


def row(row_id: Any, number: int, **attributes: Any) -> dict[str, Any]:
    return {"id": row_id, "vector": vector(number), **attributes}


@pytest.fixture
def make(db: Database, broker: EmbeddedBroker, topic: str) -> Iterator[Make]:
    """A collection that reads the test's topic."""

    def made(**options: Any) -> Collection:
        format = options.pop("format", "json")
        collection = db.create_collection(topic, **{"dim": DIM, **options})
        collection.ingest(broker.bootstrap, format=format)
        return collection

    yield made
    if topic in db.collections():
        db.drop_collection(topic)


@pytest.fixture
def nowhere() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        host, port = sock.getsockname()
    return f"{host}:{port}"


class TestRecords:
    def test_upsert_get_search_delete(self, make: Make) -> None:
        collection = make()
        rows = [row(f"r{number}", number, n=number, even=number % 2 == 0) for number in range(50)]
        written = collection.upsert(rows, wait="searchable")
        assert written.count == len(written.acks) == 50
        assert sum(written.offsets.values()) == 50
        assert {row_id for row_id, _, _ in written.acks} == {f"r{number}" for number in range(50)}
        found = collection.get(["r7", "not there", "r8"], vectors=True)
        assert [one and one.id for one in found] == ["r7", None, "r8"]
        assert found[0] is not None
        assert found[0].attributes == {"n": 7, "even": False}
        assert found[0].vector is not None
        np.testing.assert_allclose(found[0].vector, vector(7) / np.linalg.norm(vector(7)), rtol=1e-5)
        hits = collection.search(vector(9), limit=5)
        assert len(hits) == 5
        assert hits[0].id == "r9"
        assert hits[0].score == pytest.approx(1.0, abs=1e-5)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        frame = hits.to_pandas()
        assert list(frame.columns) == ["id", "score", "n", "even"]
        assert frame.iloc[0].to_dict() == {"id": "r9", "score": hits[0].score, "n": 9, "even": False}
        collection.upsert([row("r9", 1009, n=-9)])
        assert collection.search(vector(1009), limit=1)[0].attributes == {"n": -9}
        collection.delete(["r9", "r10"])
        assert collection.get(["r9", "r10"]) == [None, None]
        assert collection.count() == 48
        assert "r9" not in {hit.id for hit in collection.search(vector(9), limit=60)}
        assert collection.verify() == headrace_verification(cells=1, copies=2)

    def test_batches_of_queries(self, make: Make) -> None:
        collection = make()
        collection.upsert([row(f"r{number}", number) for number in range(20)], wait="searchable")
        answers = collection.search(np.stack([vector(3), vector(4)]), limit=2)
        assert [hits[0].id for hits in answers] == ["r3", "r4"]
        assert collection.search(np.empty((0, DIM), dtype=np.float32)) == []
        assert len(collection.search(vector(1), limit=100)) == 20

    @pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
    def test_metrics(self, make: Make, metric: str) -> None:
        collection = make(metric=metric)
        stored = {f"r{number}": vector(number) * (1 + number % 5) for number in range(60)}
        collection.upsert([{"id": row_id, "vector": given} for row_id, given in stored.items()], wait="searchable")
        query = vector(1234)
        scores = {
            row_id: {
                "cosine": query @ given / np.linalg.norm(query) / np.linalg.norm(given),
                "ip": query @ given,
                "l2": ((query - given) ** 2).sum(),
            }[metric]
            for row_id, given in stored.items()
        }
        expected = sorted(scores, key=lambda row_id: scores[row_id], reverse=metric != "l2")[:10]
        hits = collection.search(query, limit=10)
        assert [hit.id for hit in hits] == expected
        np.testing.assert_allclose([hit.score for hit in hits], [scores[row_id] for row_id in expected], rtol=1e-4)

    def test_integer_ids(self, make: Make) -> None:
        collection = make(ids="integer")
        ids = [0, -5, 1 << 40, (1 << 63) - 1]
        written = collection.upsert([row(row_id, number) for number, row_id in enumerate(ids)], wait="searchable")
        assert sorted(row_id for row_id, _, _ in written.acks) == sorted(ids)
        assert [found and found.id for found in collection.get(ids)] == ids
        collection.delete([-5], wait="searchable")
        assert sorted(found.id for found in collection.scan()) == sorted(set(ids) - {-5})
        assert collection.search(vector(2), limit=1)[0].id == 1 << 40
        with pytest.raises(RecordError, match="'word' is no integer"):
            collection.upsert([row("word", 1)])

    def test_texts(self, make: Make) -> None:
        collection = make(dim=None, encoder="minilm")
        texts = {
            "mean": "moving average of a series",
            "file": "open a file for reading",
            "sort": "sort a list of numbers",
        }
        collection.upsert([{"id": row_id, "text": text, "n": 1} for row_id, text in texts.items()], wait="searchable")
        assert collection.spec.dim == 384
        assert collection.search("rolling mean of a time series", limit=1)[0].id == "mean"
        answers = collection.search(["read from a file", "order the numbers of a list"], limit=1)
        assert [hits[0].id for hits in answers] == ["file", "sort"]
        (found,) = collection.get(["mean"])
        assert found is not None
        assert found.attributes == {"text": texts["mean"], "n": 1}
        assert collection.search("anything", limit=1)[0].attributes["text"] in texts.values()

    @pytest.mark.parametrize("format", ["json", "binary"])
    def test_records_of_other_producers(self, make: Make, broker: EmbeddedBroker, topic: str, format: str) -> None:
        producer = RecordProducer(broker.bootstrap, topic, profile="fast")
        before = [
            (*encode_json("json", vector=vector(1), attributes={"n": 1}), [("headrace-format", b"json")]),
            encode_binary("binary", vector(2), {"n": 2}),
        ]
        producer.write(before, 10.0)
        collection = make(format=format)
        key, value, headers = encode_binary("plain", vector(3))
        plain = (key, value, None) if format == "binary" else (*encode_json("plain", vector=vector(3)), None)
        assert headers
        producer.write([plain], 10.0)
        producer.close()
        assert collection.count(consistency="strong") == 3
        for number, row_id in enumerate(("json", "binary", "plain"), 1):
            assert collection.search(vector(number), limit=1)[0].id == row_id
        assert collection.status()["ingest"]["dead_letters"] == 0

    def test_frames(self, make: Make) -> None:
        collection = make()
        frame = pd.DataFrame(
            {
                "id": ["a", "b", "c"],
                "vector": [vector(1), vector(2), vector(3)],
                "n": pd.array([1, None, 3], dtype="Int64"),
                "word": ["x", None, "z"],
            }
        )
        assert collection.upsert(frame, wait="searchable").count == 3
        assert [found and found.attributes for found in collection.get(["a", "b", "c"])] == [
            {"n": 1, "word": "x"},
            {},
            {"n": 3, "word": "z"},
        ]

    def test_status(self, make: Make, db: Database, topic: str) -> None:
        collection = make()
        collection.upsert([row(f"r{number}", number, n=number) for number in range(30)], wait="searchable")
        collection.delete(["r1"], wait="searchable")
        status = collection.status()
        assert (status["name"], status["state"], status["rows"], status["codebook"]) == (topic, "healthy", 29, 0)
        assert (status["notes"], status["alarms"], status["schema"]) == ([], [], {"n": "int"})
        assert {worker["address"] for worker in status["workers"]} == set(db.workers)
        assert [worker["rows"] for worker in status["workers"]] == [29, 29]
        assert {sum(worker["watermarks"].values()) for worker in status["workers"]} == {31}
        soon(lambda: collection.status()["ingest"]["deletes"] == 1)
        ingest = collection.status()["ingest"]
        assert (ingest["records"], ingest["dead_letters"], ingest["lag"]) == (30, 0, 0)
        assert ingest["freshness_ms"]["count"] == 31
        assert set(ingest["stages_ms"]) == {"kafka", "decode", "encode", "apply", "acknowledge"}
        assert db.status()["collections"][topic]["rows"] == 29

    def test_a_scan_gives_every_row_once(self, make: Make, db: Database) -> None:
        collection = make()
        collection.upsert([row(f"r{number}", number % 40) for number in range(2500)], wait="searchable")
        everything = sorted(f"r{number}" for number in range(2500))
        assert sorted(str(found.id) for found in collection.scan()) == everything
        for worker in db.workers:
            assert sorted(str(found.id) for found in collection.scan(worker=worker)) == everything
        (first, *_) = collection.scan(vectors=True)
        assert first.vector is not None


def headrace_verification(cells: int, copies: int) -> Any:
    from headrace.pipeline.results import Verification

    return Verification(True, cells, copies, [])


def soon(condition: Callable[[], object], deadline: float = 20.0) -> None:
    until = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < until, f"still not after {deadline:g} s"
        time.sleep(0.02)


def sentence(caught: pytest.ExceptionInfo[HeadraceError]) -> str:
    """The message: one line that a person can act on."""
    text = str(caught.value)
    assert 20 < len(text) < 400, text
    assert "\n" not in text
    assert "Traceback" not in text
    return text


class TestErrors:
    def test_collections(self, make: Make, db: Database, topic: str, broker: EmbeddedBroker) -> None:
        collection = make()
        with pytest.raises(CollectionExists) as exists:
            db.create_collection(topic, dim=3)
        assert repr(topic) in sentence(exists)
        with pytest.raises(CollectionNotFound) as not_found:
            db.collection("nothing")
        assert topic in sentence(not_found), "what there is should be told"
        broker.create_topic(f"{topic}-other", 2)
        with pytest.raises(CollectionError) as other_topic:
            collection.ingest(broker.bootstrap, f"{topic}-other")
        assert "reads topic" in sentence(other_topic)
        collection.ingest(broker.bootstrap)
        db.drop_collection(topic)
        with pytest.raises(CollectionNotFound):
            db.drop_collection(topic)
        assert topic not in db.collections()

    def test_dropped_and_made_again(self, make: Make, db: Database, topic: str) -> None:
        collection = make()
        collection.upsert([row("a", 1)], wait="searchable")
        db.drop_collection(topic)
        again = make()
        assert again.count(consistency="strong") == 1, "the log is the truth: it is read again from its start"

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"dim": 0}, "dim=0"),
            ({}, "dim=None"),
            ({"dim": 3, "metric": "hamming"}, "cosine"),
            ({"dim": 3, "ids": "uuid"}, "'string' or 'integer'"),
            ({"dim": 3, "cells": 0}, "cells=0"),
            ({"dim": 3, "replicas": 0}, "replicas=0"),
            ({"dim": 3, "encoder": "minilm"}, "384"),
            ({"dim": 3, "attributes": {"n": "complex"}}, "complex"),
        ],
    )
    def test_collections_that_cannot_be(self, db: Database, options: dict[str, Any], says: str) -> None:
        with pytest.raises(ConfigError) as caught:
            db.create_collection("wrong", **options)
        assert says in sentence(caught)
        assert "wrong" not in db.collections()

    def test_an_unknown_encoder(self, db: Database) -> None:
        with pytest.raises(EncoderError) as caught:
            db.create_collection("wrong", encoder="maxilm")
        assert "maxilm" in sentence(caught)
        assert "minilm" in str(caught.value), "what there is should be told"

    def test_rows_that_cannot_be(self, make: Make) -> None:
        collection = make()
        good = row("good", 1)
        for bad, says in (
            ({"id": "a", "vector": vector(1)[:-1]}, "vectors of 16 numbers"),
            ({"vector": vector(1)}, "row 1 has no 'id'"),
            ({"id": 7, "vector": vector(1)}, "id 7 is no string"),
            ({"id": "a"}, "neither a 'text' nor a 'vector'"),
            ({"id": "a", "text": "words"}, "has no encoder"),
            ({"id": "a", "vector": np.full(DIM, np.nan)}, "not finite"),
            ({"id": "a", "vector": vector(1), "n": [1, 2]}, "'n'"),
        ):
            with pytest.raises(RecordError) as caught:
                collection.upsert([good, bad])
            assert says in sentence(caught)
        assert collection.count(consistency="strong") == 0, "part of a refused write was sent"
        with pytest.raises(ConfigError, match="wait='now' is not known"):
            collection.upsert([good], wait="now")

    def test_queries_that_cannot_be(self, make: Make) -> None:
        collection = make()
        for query, says in (
            (np.ones(DIM + 1), "vectors of 16 numbers"),
            (np.full(DIM, np.inf), "not finite"),
            (np.zeros(DIM), "zero vector"),
            ("words", "has no encoder"),
            ({"a": 1}, "neither a text nor a vector"),
            ([10**400, 1], "neither a text nor a vector"),
        ):
            with pytest.raises(RecordError) as caught:
                collection.search(query)
            assert says in sentence(caught)
        with pytest.raises(ConfigError, match="limit=0"):
            collection.search(vector(1), limit=0)

    def test_kafka(self, db: Database, broker: EmbeddedBroker, topic: str, nowhere: str) -> None:
        collection = db.create_collection(topic, dim=DIM)
        with pytest.raises(CollectionError) as no_topic_yet:
            collection.upsert([row("a", 1)])
        assert "call ingest(" in sentence(no_topic_yet)
        with pytest.raises(TopicError) as missing:
            collection.ingest(broker.bootstrap, "no-such-topic")
        assert "'no-such-topic'" in sentence(missing)
        with pytest.raises(BrokerError) as unreachable:
            collection.ingest(nowhere)
        assert nowhere in sentence(unreachable)
        with pytest.raises(ConfigError, match="record format 'avro' is not known"):
            collection.ingest(broker.bootstrap, format="avro")
        collection.ingest(broker.bootstrap)
        assert collection.upsert([row("a", 1)], wait="searchable").count == 1
        db.drop_collection(topic)

    def test_no_scheduler(self, nowhere: str) -> None:
        with pytest.raises(ClusterError) as caught:
            headrace.connect(f"tcp://{nowhere}", timeout=0.5)
        assert nowhere in sentence(caught)
        assert "headrace up" in str(caught.value)
        with pytest.raises(ConfigError, match="0 workers"):
            headrace.connect(workers=0)
        with pytest.raises(ConfigError, match="without TLS"):
            headrace.connect(processes=True, host="0.0.0.0")


async def test_asynchronous(broker: EmbeddedBroker, topic: str) -> None:
    async with await headrace.connect_async(workers=2, backend="host") as db:
        assert len(await db.workers()) == 2
        collection = await db.create_collection(topic, dim=DIM)
        await collection.ingest(broker.bootstrap)
        await collection.upsert([row(f"r{number}", number) for number in range(20)], wait="searchable")
        gets = [collection.get([f"r{number}"]) for number in range(20)]
        assert [found[0] and found[0].id for found in await asyncio.gather(*gets)] == [f"r{n}" for n in range(20)]
        hits = await collection.search(vector(3), limit=1)
        assert isinstance(hits, headrace.Hits)
        assert hits[0].id == "r3"
        await collection.delete(["r3"], wait="searchable")
        assert await collection.count() == 19
        assert sorted([str(found.id) async for found in collection.scan()]) == sorted(
            f"r{number}" for number in range(20) if number != 3
        )
        assert (await collection.verify()).ok
        assert (await collection.status())["state"] == "healthy"
        assert await db.collections() == [topic]
        with pytest.raises(CollectionNotFound):
            await db.collection("nothing")
        await db.drop_collection(topic)
        assert await db.collections() == []


class Clustered:
    """Vectors in clusters, written by a thread of its own until it is told to stop; one id in eight is deleted."""

    def __init__(self, collection: Any, *, dim: int = DIM, clusters: int = 8) -> None:
        self._collection = collection
        self._random = np.random.default_rng(5)
        self._centres = 4 * self._random.normal(size=(clusters, dim))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._write, name="writer")
        self.errors: list[Exception] = []
        self.live: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()

    def near(self) -> np.ndarray:
        centre = self._centres[self._random.integers(len(self._centres))]
        return (centre + self._random.normal(size=centre.shape)).astype(np.float32)

    def write(self, first: int, count: int = 40) -> None:
        rows = [{"id": f"r{number}", "vector": self.near(), "n": number} for number in range(first, first + count)]
        gone = [f"r{number}" for number in range(first - count, first, 8) if number >= 0]
        with self._lock:
            for row_id in gone:
                self.live.pop(row_id, None)
        self._collection.upsert(rows)
        if gone:
            self._collection.delete(gone)
        with self._lock:
            self.live |= {row["id"]: row["vector"] for row in rows}

    def _write(self) -> None:
        try:
            for number in itertools.count():
                if self._stop.wait(0.02):
                    return
                self.write(40 * number)
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the test
            self.errors.append(error)

    def some(self, count: int = 10) -> dict[str, np.ndarray]:
        """Ids that are live now and will not be deleted: an id is deleted with the block after its own, or never."""
        with self._lock:
            safe = [row_id for row_id in self.live if int(row_id[1:]) % 8]
            return {row_id: self.live[row_id] for row_id in safe[-count:] + safe[:count]}

    def __enter__(self) -> Clustered:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        assert not self.errors, self.errors


def read_until(recorded: Any, clustered: Clustered, condition: Callable[[], bool], deadline: float = 60.0) -> int:
    """Search and get ids that are live until something is so; none may be missed. Gives the number of rounds."""
    until = time.monotonic() + deadline
    for rounds in itertools.count(1):
        wanted = clustered.some()
        if wanted:
            found = recorded.get(list(wanted))
            missed = [row_id for row_id, one in zip(wanted, found, strict=True) if one is None]
            assert not missed, f"a get missed {missed}"
            row_id, nearest = list(wanted.items())[rounds % len(wanted)]
            hits = recorded.search(nearest, limit=5)
            assert hits[0].id == row_id, f"a search for {row_id} missed it"
            assert len({hit.id for hit in hits}) == len(hits)
        if condition():
            return rounds
        assert time.monotonic() < until, f"still not after {deadline:g} s"
    raise AssertionError


def test_a_codebook_is_adopted_and_a_worker_joins_under_writes(broker: EmbeddedBroker, topic: str) -> None:
    """Rows move to new cells and to a new worker while they are written, deleted and read: none is ever missed."""
    options = {"headrace.codebook.min-rows": 300, "headrace.codebook.iterations": 5}
    with dask.config.set(options), headrace.connect(workers=3, backend="host") as db:
        collection = db.create_collection(topic, dim=DIM, cells=8, replicas=2)
        collection.ingest(broker.bootstrap)
        recorder = Recorder(seed=5, command="pytest tests/pipeline/test_end_to_end.py -k codebook")
        recorded = recorder.wrap(collection, "only")

        def adopted() -> bool:
            status = collection.status()
            return status["codebook"] == 1 and not status["moving"]

        def joined() -> bool:
            workers = collection.status()["workers"]
            return len(workers) == 4 and all(worker["state"] == "active" for worker in workers)

        with Clustered(recorded) as clustered:
            read_until(recorded, clustered, adopted)
            seen = set(db.workers)
            db._owns[0].scale(4)
            read_until(recorded, clustered, joined)
            read_until(recorded, clustered, lambda: len(clustered.live) > 1500)
        collection.count(consistency="strong")
        verification = collection.verify()
        assert (verification.ok, verification.copies) == (True, 16), verification.differences
        status = collection.status()
        assert (status["state"], status["codebook"], status["cells"]) == ("healthy", 1, 8)
        assert {len(holders) for holders in status["placement"].values()} == {2}
        assert len(status["placement"]) == 8
        (late,) = set(db.workers) - seen
        rows = {str(found.id): found for found in collection.scan()}
        assert rows.keys() == clustered.live.keys()
        assert collection.count() == len(rows)
        found = collection.get(sorted(rows), consistency="strong")
        assert [one and one.id for one in found] == sorted(rows)
        hits = collection.search(clustered.near(), limit=len(rows) + 50)
        assert sorted(str(hit.id) for hit in hits) == sorted(rows), "each id exactly once"
        assert sum(worker["rows"] for worker in status["workers"]) == 2 * len(rows)
        assert late in {worker["address"] for worker in status["workers"]}
        recorder.final_state(collection, replicas=2)
        report = check_all(recorder.history(), freshness_ms=None, required=("I1", "I2", "I3", "I5", "promise"))
        assert report.ok, str(report)


def test_a_count_is_right_while_rows_get_their_first_cells(broker: EmbeddedBroker, topic: str) -> None:
    with dask.config.set({"headrace.codebook.min-rows": 3000}), headrace.connect(workers=3, backend="host") as db:
        collection = db.create_collection(topic, dim=DIM, cells=16, replicas=1)
        collection.ingest(broker.bootstrap)
        given = np.random.default_rng(3).normal(size=(4000, DIM)).astype(np.float32)
        collection.upsert(
            [{"id": f"r{n}", "vector": row} for n, row in enumerate(given)], wait="searchable", deadline=60
        )
        counts: set[int] = set()
        until = time.monotonic() + 60
        while (status := collection.status())["codebook"] == 0 or status["moving"]:
            counts.add(collection.count())
            assert time.monotonic() < until, "the codebook is not adopted"
        counts.add(collection.count())
        assert counts == {4000}


def test_a_late_worker_is_filled_and_serves(broker: EmbeddedBroker, topic: str) -> None:
    with headrace.connect(workers=1, backend="host") as db:
        collection = db.create_collection(topic, dim=DIM, replicas=2)
        collection.ingest(broker.bootstrap)
        collection.upsert([row(f"r{number}", number) for number in range(700)], wait="searchable")
        (first,) = db.workers
        status = collection.status()
        assert status["state"] == "degraded", "one copy is not two"
        assert "fewer than 2 complete copies" in status["notes"][0]
        db._owns[0].scale(2)
        soon(lambda: collection.status()["state"] == "healthy")
        (late,) = set(db.workers) - {first}
        assert sum(1 for _ in collection.scan(worker=late)) == 700
        assert collection.verify() == headrace_verification(cells=1, copies=2)
        db._owns[0].scale(1)
        soon(lambda: len(collection.status()["workers"]) == 1)
        assert collection.count() == 700
        assert collection.search(vector(77), limit=1)[0].id == "r77"
        assert collection.status()["incarnation"] == 0
