"""A worker process dies by SIGKILL in mid-stream: nothing acknowledged is lost, and nothing is claimed too soon."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition

from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker
from tests.history.checker import check_all
from tests.history.events import Committed, Produced, WatermarkSample
from tests.history.recorder import Recorded, Recorder

log = logging.getLogger("tests.faults")

DIM = 32
SEED = 20260714
COMMAND = "pytest tests/faults/test_worker_killed.py"
STEADY_MS = 20.0
"""Where the p99 without a fault is above this, the machine stalls by itself and its times say nothing."""

Quiet = Callable[..., dict[str, Any]]


def vector(number: int) -> np.ndarray:
    return np.random.default_rng([SEED, number]).normal(size=DIM).astype(np.float32)


class Writer:
    """Upserts and deletes from a thread of its own, without a pause that would leave a batch finished."""

    def __init__(self, collection: Recorded, ids: int = 1500, rows: int = 60) -> None:
        self._collection, self._ids, self._rows = collection, ids, rows
        self._random = np.random.default_rng(SEED)
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._number = 0
        self.writes = 0

    def _write(self) -> None:
        while not self._stop.wait(0.01):
            chosen = self._random.integers(0, self._ids, self._rows)
            gone = self._random.choice(chosen, 4)
            try:
                self._collection.upsert([self._row(f"r{which}") for which in chosen])
                self._collection.delete([f"r{which}" for which in gone])
            except Exception as error:  # noqa: BLE001 - raised again in the thread of the test
                self._errors.append(error)
                return
            self.writes += 1

    def _row(self, row_id: str) -> dict[str, Any]:
        self._number += 1
        return {"id": row_id, "vector": vector(self._number), "n": self._number}

    @contextmanager
    def running(self) -> Iterator[Writer]:
        thread = threading.Thread(target=self._write, name="writer")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()
        if self._errors:
            raise self._errors[0]

    def wait_for(self, writes: int, deadline: float = 20.0) -> None:
        until = time.monotonic() + deadline
        while self.writes < writes and not self._errors:
            assert time.monotonic() < until, f"{self.writes} of {writes} writes after {deadline:g} s"
            time.sleep(0.01)


@contextmanager
def committed_sampled(recorder: Recorder, bootstrap: str, collection: str, topic: str) -> Iterator[None]:
    """Note every 50 ms what Kafka has been told, by a consumer that is none of the product's.

    In a thread of its own, because a worker's status may take its time just when one has died.
    """
    stop = threading.Event()
    failures: list[Exception] = []
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": f"headrace-{collection}"})
    places = [TopicPartition(topic, number) for number in range(4)]

    def loop() -> None:
        while not stop.wait(0.05):
            started = recorder.now()
            try:
                told = consumer.committed(places, timeout=5.0)
            except KafkaException as error:
                failures.append(error)
                return
            offsets = {place.partition: place.offset for place in told if place.offset >= 0}
            recorder.note(Committed(recorder.now(), offsets, started))

    thread = threading.Thread(target=loop, name="committed-sampler")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        consumer.close()
    assert not failures, failures


def kill_in_mid_batch(db: Database, collection: Collection, recorded: Recorded) -> tuple[str, int]:
    """SIGKILL a worker while records are known to be in Kafka and not applied everywhere; gives its address and pid."""
    address, pid = sorted(db.workers.items())[0]
    for attempt in range(50):
        recorded.upsert([{"id": f"burst-{number}", "vector": vector(number), "n": attempt} for number in range(1000)])
        if collection.status()["ingest"]["lag"] > 0:
            os.kill(pid, signal.SIGKILL)
            return address, pid
    raise AssertionError("every burst had been applied before the kill: it would hit no batch")


def searchable(recorded: Recorded, probe: str, count: int, deadline: float = 20.0) -> list[float]:
    """Seconds from handing in a record to every copy's having it, `count` times."""
    took = []
    for number in range(count):
        started = time.monotonic()
        row = {"id": f"{probe}-{number}", "vector": vector(10_000 + number), "n": number}
        recorded.upsert([row], wait="searchable", deadline=deadline)
        took.append(time.monotonic() - started)
    return took


def judge(recorder: Recorder, recorded: Recorded, collection: Collection, *, replicas: int, required: str) -> None:
    """Look at everything that is there now, by get, by exhaustive search and by scanning every copy."""
    produced = {event.id for event in recorder.history().events if isinstance(event, Produced)}
    ids = sorted(map(str, produced))
    recorded.get(ids, consistency="strong", deadline=20.0)
    for _ in range(4):  # by turns on different copies
        recorded.search(vector(1), limit=len(ids) + 10, consistency="strong", deadline=20.0, exhaustive=True)
    recorder.final_state(collection, replicas=replicas)
    report = check_all(recorder.history(), freshness_ms=None, required=required.split())
    assert report.ok, str(report)


def test_killed_in_mid_batch(processes: Database, broker: EmbeddedBroker, topic: str, until_quiet: Quiet) -> None:
    collection = processes.create_collection(topic, dim=DIM, replicas=2)
    collection.ingest(broker.bootstrap)
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorded = recorder.wrap(collection, "only")
    with committed_sampled(recorder, broker.bootstrap, topic, topic), recorder.sampling(collection):
        steady_ms = 1e3 * float(np.percentile(searchable(recorded, "before", 40), 99))
        with Writer(recorded).running() as writer:
            writer.wait_for(20)
            with recorder.fault("SIGKILL of a worker"):
                victim = kill_in_mid_batch(processes, collection, recorded)
                back = searchable(recorded, "after", 1)[0]
            written = writer.writes
            writer.wait_for(written + 20)
        status = until_quiet(collection, workers=2)
        recorder.sample(collection)
    log.info("p99 searchable without a fault, ms: %s", round(steady_ms, 1))
    log.info("searchable again after the kill, s: %s", round(back, 3))
    assert back < (1.0 if steady_ms < STEADY_MS else 10.0)
    assert victim not in processes.workers.items(), "the worker that died is still counted on"
    assert status["incarnation"] == 0, "a copy was left, and still the log was read again"
    assert status["state"] == "healthy"
    assert {len(holders) for holders in status["placement"].values()} == {2}
    events = recorder.history().events
    sampled = sum(isinstance(event, Committed) and bool(event.offsets) for event in events)
    assert {w["address"] for w in status["workers"]} == set(processes.workers)
    log.info("samples of committed offsets: %s", sampled)
    assert sampled > 20
    assert len({event.worker for event in events if isinstance(event, WatermarkSample)}) == 3
    judge(recorder, recorded, collection, replicas=2, required="I1 I2 I3 I5 promise")
    assert collection.verify().ok
    processes.drop_collection(topic)


def test_killed_with_the_only_copy(processes: Database, broker: EmbeddedBroker, topic: str, until_quiet: Quiet) -> None:
    collection = processes.create_collection(topic, dim=DIM, replicas=1, cells=1)
    collection.ingest(broker.bootstrap)
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorded = recorder.wrap(collection, "only")
    (holder,) = collection.status()["placement"][0]
    with Writer(recorded).running() as writer:
        writer.wait_for(10)
        os.kill(processes.workers[holder], signal.SIGKILL)
        killed = time.monotonic()
        written = writer.writes
        writer.wait_for(written + 10)
    assert searchable(recorded, "after", 1)[0] < 5.0, "a write waited for a worker that is dead"
    log.info("everything read again, s: %s", round(time.monotonic() - killed, 3))
    status = until_quiet(collection, workers=2, ignore=True)
    assert status["incarnation"] == 1
    assert status["state"] == "degraded"
    (alarm,) = status["alarms"]
    assert "the last copy of 1 cells was lost: the log was read again from its start" in alarm
    judge(recorder, recorded, collection, replicas=1, required="I1 I2 I3 promise")
    processes.drop_collection(topic)


def test_a_commit_that_ran_ahead_would_be_seen() -> None:
    """The judgement of this module's first test can fail."""
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorder.note(Committed(2.0, {0: 7}, 1.0), WatermarkSample(4.0, "tcp://w:1", {0: 6}, started=3.0))
    report = check_all(recorder.history(), freshness_ms=None, required=())
    assert not report.ok
    with pytest.raises(AssertionError, match="was committed while"):
        assert report.ok, str(report)
