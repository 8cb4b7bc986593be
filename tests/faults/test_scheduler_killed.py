"""Row 4: the scheduler dies by SIGKILL and another takes its place after 5 s; nobody who reads or writes fails.

The cluster is one as `headrace scheduler` and `headrace worker` make it, each in a process of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import headrace
from benchmarks.fault_cluster import SchedulerProcess, command, end
from headrace.gpu.errors import CollectionExists
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker
from tests.faults.test_worker_killed import DIM, SEED, Quiet, Writer, judge, searchable, vector
from tests.history.recorder import Recorded, Recorder

# Dask leaves sockets to a scheduler that was killed to the collector, which may come by at any time.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")]

log = logging.getLogger("tests.faults")

COMMAND = "pytest tests/faults/test_scheduler_killed.py"
AWAY = 5.0
"""Seconds between the kill and the next scheduler's start."""


@pytest.fixture(scope="module")
def scheduler() -> Iterator[SchedulerProcess]:
    running = SchedulerProcess()
    try:
        running.wait()
        yield running
    finally:
        running.end()


@pytest.fixture(scope="module")
def cluster(scheduler: SchedulerProcess) -> Iterator[Database]:
    workers = command("worker", scheduler.address, "--workers", "2")
    try:
        with headrace.connect(scheduler.address, backend="host", timeout=60) as db:
            until = time.monotonic() + 60
            while len(db.workers) < 2:
                assert time.monotonic() < until, "the workers did not come"
                time.sleep(0.05)
        # Dask's own client would close itself when it had been without a scheduler for this long.
        with headrace.connect(scheduler.address, backend="host", timeout=AWAY - 1) as db:
            yield db
    finally:
        end(workers)


class Reader:
    """Searches and gets without a pause, each level by turns; every one is timed."""

    LEVELS = ("eventual", "session", headrace.bounded(500), "strong")

    def __init__(self, collection: Recorded) -> None:
        self._collection = collection
        self._stop = threading.Event()
        self.errors: list[str] = []
        self.took: list[tuple[float, float]] = []

    def _read(self) -> None:
        number = 0
        while not self._stop.wait(0.005):
            level = self.LEVELS[number % 4]
            began = time.monotonic()
            try:
                if number % 8 < 4:
                    self._collection.search(vector(number), consistency=level)
                else:
                    self._collection.get([f"r{number % 1500}"], consistency=level)
            except Exception as error:  # noqa: BLE001 - counted
                self.errors.append(f"{level}: {type(error).__name__}: {error}")
            self.took.append((began, time.monotonic() - began))
            number += 1

    @contextmanager
    def running(self) -> Iterator[Reader]:
        thread = threading.Thread(target=self._read, name="reader")
        thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            thread.join()


def rows_read(collection: Collection) -> int:
    """Records that the workers have taken in since they began: a log that is read again shows here."""
    taken: dict[str, Any] = collection.status()["ingest"]
    return int(taken["records"] + taken["deletes"])


def test_search_and_ingest_go_on_without_a_scheduler(
    scheduler: SchedulerProcess, cluster: Database, broker: EmbeddedBroker, topic: str, until_quiet: Quiet
) -> None:
    collection = cluster.create_collection(topic, dim=DIM, replicas=2, cells=4, attributes={"late": "float"})
    collection.ingest(broker.bootstrap)
    recorder = Recorder(seed=SEED, command=COMMAND)
    recorded = recorder.wrap(collection, "only")
    searchable(recorded, "first", 3)
    before = cluster.workers
    epoch = collection.status()["epoch"]
    pauses: list[tuple[float, float]] = []
    with Reader(recorded).running() as reader, Writer(recorded).running() as writer:
        writer.wait_for(20)
        with recorder.fault("SIGKILL of the scheduler"):
            scheduler.kill()
            killed = time.monotonic()
            while time.monotonic() - killed < AWAY:
                began = time.monotonic()
                searchable(recorded, f"away-{len(pauses)}", 1, deadline=10.0)
                pauses.append((began - killed, time.monotonic() - began))
                time.sleep(0.1)
            scheduler.start()
            scheduler.wait()
            restarted = time.monotonic()
            recorded.upsert([{"id": "back", "vector": vector(9), "fresh": "x"}], wait="searchable", deadline=30.0)
            new_column = time.monotonic() - restarted
            until = restarted + 30
            while cluster_workers(cluster) != before:
                assert time.monotonic() < until, f"{cluster_workers(cluster)} of {before} returned"
                time.sleep(0.02)
            returned = time.monotonic() - restarted
        written = writer.writes
        writer.wait_for(written + 20)
        time.sleep(2.0)
    status = until_quiet(collection, workers=2)
    slow = max(seconds for began, seconds in reader.took if began > killed - 0.5)
    log.info(
        "reads: %d, failed: %d, slowest since the kill, ms: %.1f", len(reader.took), len(reader.errors), 1e3 * slow
    )
    log.info("searchable without a scheduler, ms: %s", [round(1e3 * seconds) for _, seconds in pauses])
    log.info("workers returned after, s: %.3f; a new column was taken after, s: %.3f", returned, new_column)
    assert not reader.errors, reader.errors[:5]
    assert len(pauses) > 3, "the log stood still while the scheduler was away"
    assert new_column < 10.0
    assert cluster.workers == before, "not the same processes"
    assert status["incarnation"] == 0
    assert not status["alarms"]
    assert status["epoch"] > epoch
    # Declared, met before the kill, met while no scheduler was there.
    assert status["schema"] == {"late": "float", "n": "int", "fresh": "str"}
    assert {w["address"] for w in status["workers"]} == set(before)
    end_offsets = sum(dict(status["workers"][0]["watermarks"]).values())
    assert rows_read(collection) <= end_offsets, "records were read more than once"
    with pytest.raises(CollectionExists):
        cluster.create_collection(topic, dim=DIM)
    judge(recorder, recorded, collection, replicas=2, required="I1 I2 I3 promise")
    assert collection.verify().ok


def cluster_workers(cluster: Database) -> dict[str, int]:
    try:
        return cluster.workers
    except headrace.ClusterError:
        return {}


def test_a_client_that_comes_later_finds_everything(
    scheduler: SchedulerProcess, cluster: Database, broker: EmbeddedBroker, topic: str
) -> None:
    """Twice in a row, and nobody was connected in between who could have brought anything back."""
    collection = cluster.create_collection(topic, dim=DIM, replicas=2)
    collection.ingest(broker.bootstrap)
    collection.upsert([{"id": f"r{n}", "vector": vector(n), "n": n} for n in range(100)], wait="searchable")
    before = cluster.workers
    for _ in range(2):
        scheduler.kill()
        scheduler.start()
        scheduler.wait()
        with headrace.connect(scheduler.address, backend="host", timeout=60) as other:
            until = time.monotonic() + 30
            while topic not in other.collections():
                assert time.monotonic() < until, "the collection is gone"
                time.sleep(0.02)
            found = other.collection(topic)
            assert found.count(consistency="strong", deadline=20.0) == 100
            assert [hit.id for hit in found.search(vector(7), limit=1)] == ["r7"]
            assert found.status()["schema"] == {"n": "int"}, "a column that was met is forgotten"
            until = time.monotonic() + 30
            while cluster_workers(other) != before:
                assert time.monotonic() < until, f"{cluster_workers(other)} of {before} returned"
                time.sleep(0.02)
    assert np.isclose(collection.search(vector(3), limit=1)[0].score, 1.0, atol=1e-5)
    cluster.drop_collection(topic)
    assert topic not in cluster.collections()
