"""A topic on Apache Kafka becomes a searchable collection: written, changed, deleted, idle."""

from __future__ import annotations

import json
import queue
import time

import numpy as np
import pytest

from headrace.pipeline.client import Collection, Database
from headrace.streams.reader import Reader, ReaderSettings
from tests.kafka.conftest import Until
from tests.kafka.real_broker import RealBroker
from tests.kafka.writing import DIM, row, rows, vector

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


def test_a_topic_becomes_searchable(collection: Collection) -> None:
    written = collection.upsert(rows(*range(200)), wait="searchable")
    assert written.count == 200
    for number in (0, 99, 199):
        best = collection.search(vector(number), limit=1, consistency="strong")[0]
        assert (best.id, best.attributes["n"]) == (f"r{number}", number)
    assert collection.count(consistency="strong") == 200
    status = collection.status()
    assert status["state"] == "healthy"
    assert status["ingest"]["dead_letters"] == 0
    assert collection.verify().ok


def test_what_was_written_before_is_read(kafka: RealBroker, collection: Collection, db: Database, name: str) -> None:
    collection.upsert(rows(*range(50)))
    later = db.create_collection(f"{name}-later", dim=DIM, replicas=1)
    later.ingest(kafka.bootstrap, name)
    assert later.count(consistency="strong") == 50
    db.drop_collection(f"{name}-later")


def test_tombstones_delete(collection: Collection) -> None:
    collection.upsert(rows(*range(40)), wait="searchable")
    collection.delete([f"r{number}" for number in range(0, 40, 2)], wait="searchable")
    collection.upsert([row(2, again=True)], wait="searchable")
    found = collection.get([f"r{number}" for number in range(40)], consistency="strong")
    there = {number for number in range(40) if found[number] is not None}
    assert there == {2, *range(1, 40, 2)}
    assert found[2].attributes["again"] is True
    assert {hit.id for hit in collection.search(vector(0), limit=100)} == {f"r{number}" for number in there}


def test_an_idle_topic_costs_little(kafka: RealBroker, name: str, until: Until) -> None:
    """Fetches per second while nothing comes, from librdkafka's own statistics; a record comes at once all the same."""
    kafka.create_topic(name, 4)
    told: list[dict] = []
    batches: queue.SimpleQueue = queue.SimpleQueue()
    statistics = {"statistics.interval.ms": "250", "stats_cb": lambda text: told.append(json.loads(text))}
    reader = Reader(kafka.bootstrap, name, name, batches.put, pytest.fail, ReaderSettings(kafka=statistics))
    reader.assign(dict.fromkeys(range(4), 0))
    reader.start()
    try:
        until("the statistics are told", lambda: len(told) >= 4)
        first, began = told[-1], len(told)
        until("the statistics are told", lambda: len(told) >= began + 8)
    finally:
        reader.stop()
    last = told[began + 7]
    fetches = _fetches(last) - _fetches(first)
    seconds = (last["ts"] - first["ts"]) / 1e6
    print(f"\nidle: {fetches / seconds:.1f} fetches/s")
    assert 0 < fetches / seconds < 25


def _fetches(statistics: dict) -> int:
    return sum(broker["req"].get("Fetch", 0) for broker in statistics["brokers"].values())


def test_how_long_a_record_takes(collection: Collection) -> None:
    """Only printed: the machine may be doing anything else."""
    took = []
    for number in range(100):
        started = time.perf_counter()
        collection.upsert(rows(number), wait="searchable")
        took.append(1e3 * (time.perf_counter() - started))
    p50, p99 = np.percentile(took, (50, 99))
    freshness = collection.status()["ingest"]["freshness_ms"]
    print(f"\nwritten until searchable on both copies, ms: p50 {p50:.1f}, p99 {p99:.1f}; freshness {freshness}")
