"""A worker that is full: records wait in Kafka, it says so, and nobody takes it for dead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import dask.config
import numpy as np
import pytest

import headrace
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.dead_letters import read_dead_letters

DIM = 64
LIMIT = 1 << 20
ROWS = 6000


@pytest.fixture
def small() -> Iterator[Database]:
    """A cluster of two workers that hold a mebibyte each, and notice quickly when there is room again."""
    limits = {"headrace.store.memory-limit": LIMIT, "headrace.ingest.retry-delay-max": "100ms"}
    with dask.config.set(limits), headrace.connect(workers=2, backend="host") as running:
        yield running


def until(collection: Collection, reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The first status of which that is true."""
    end = time.monotonic() + 60
    while not reached(status := collection.status()):
        assert time.monotonic() < end, status
        time.sleep(0.05)
    return status


def test_records_wait_in_kafka_until_there_is_room(small: Database, broker: EmbeddedBroker, topic: str) -> None:
    collection = small.create_collection(topic, dim=DIM, metric="l2", cells=1)
    collection.ingest(broker.bootstrap)
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    collection.upsert([{"id": f"r{n}", "vector": vectors[n]} for n in range(ROWS)])
    status = until(collection, lambda status: "reached store.memory-limit" in " ".join(status["notes"]))
    assert status["state"] == "degraded"
    epoch = status["epoch"]
    time.sleep(1.0)  # long enough for a suspect to have left the placement
    status = until(collection, lambda status: status["ingest"]["lag"] > 0)
    assert sum("took no more rows: records waited in Kafka" in alarm for alarm in status["alarms"]) in (1, 2)
    assert [worker["state"] for worker in status["workers"]] == ["active", "active"]
    assert status["epoch"] == epoch, "the placement was changed because of it"
    assert 0 < status["rows"] < ROWS
    assert status["ingest"]["dead_letters"] == 0
    for worker in status["workers"]:
        assert worker["memory"]["limit"] == LIMIT
        # A little above, for moments: a segment that is sealed while rows come in leaves a larger one.
        assert worker["memory"]["held"] <= 1.05 * LIMIT
    assert any(worker["memory"]["full"] for worker in status["workers"])
    assert collection.search(vectors[0], limit=1, consistency="eventual")[0].id == "r0"

    for plugin in [worker.plugins["headrace"] for worker in small._owns[0].workers.values()]:
        plugin._budget.limit = 1 << 30
    until(collection, lambda status: status["rows"] == ROWS)
    assert collection.count(consistency="strong") == ROWS
    assert collection.verify().ok
    status = collection.status()
    assert "memory-limit" not in " ".join(status["notes"])
    assert not any(worker["memory"]["full"] for worker in status["workers"])


def test_a_record_that_no_worker_can_hold_is_a_dead_letter(small: Database, broker: EmbeddedBroker, topic: str) -> None:
    collection = small.create_collection(topic, dim=2, metric="l2", cells=1)
    collection.ingest(broker.bootstrap)
    rows = [{"id": f"r{n}", "vector": [n, 1.0], "story": ""} for n in range(40)]
    rows[7] |= {
        "story": "x" * 990_000
    }  # rows get seven eighths of the limit, and some of that is taken by an empty store
    write = collection.upsert(rows, wait="searchable", deadline=60.0)
    (letter,) = read_dead_letters(broker.bootstrap, topic)
    ((_, topic_partition, offset),) = [ack for ack in write.acks if ack[0] == "r7"]
    assert (letter.topic_partition, letter.offset) == (topic_partition, offset)
    assert "store.memory-limit is 1,048,576" in letter.reason
    assert collection.count() == 39
    assert collection.get(["r7"]) == [None]
    status = until(collection, lambda status: status["ingest"]["lag"] == 0)
    assert status["ingest"]["dead_letters"] == 1
    assert "memory-limit" not in " ".join([*status["notes"], *status["alarms"]])
    assert collection.verify().ok
