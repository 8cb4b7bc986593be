"""Workers that come, go and are emptied while records flow: no copy lacks anything, and no read fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import headrace
from headrace.gpu.errors import ClusterError
from headrace.streams.broker import EmbeddedBroker

DIM, ROWS = 8, 400


class Traffic:
    """Writes and reads until the block ends; whatever went wrong is raised then."""

    def __init__(self, docs: headrace.Collection) -> None:
        self.docs, self.written, self.searched = docs, 0, 0
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(2)

    def __enter__(self) -> Traffic:
        self._running = [self._pool.submit(self._run, work) for work in (self._write, self._read)]
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._pool.shutdown()
        for running in self._running:
            running.result()

    def _run(self, work: Callable[[], None]) -> None:
        while not self._stop.is_set():
            work()
            time.sleep(0.005)

    def _write(self) -> None:
        self.docs.upsert({"id": f"new-{self.written}", "vector": vector(self.written)})
        self.written += 1

    def _read(self) -> None:
        number = self.searched % ROWS
        hits = self.docs.search(vector(number), limit=1, consistency="eventual")
        assert hits[0].score > 0.999, f"row {number} was not found"
        self.searched += 1


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(DIM).astype(np.float32)


@pytest.fixture(scope="module")
def scaled() -> Iterator[headrace.Database]:
    with headrace.connect(workers=2, backend="host") as running:
        yield running


@pytest.fixture
def docs(scaled: headrace.Database, broker: EmbeddedBroker, topic: str) -> Iterator[headrace.Collection]:
    collection = scaled.create_collection(topic, dim=DIM, cells=12, replicas=2)
    collection.ingest(broker.bootstrap, topic)
    collection.upsert([{"id": f"d{n}", "vector": vector(n)} for n in range(ROWS)], wait="searchable")
    yield collection
    scaled.drop_collection(topic)


def complete(docs: headrace.Collection, traffic: Traffic) -> None:
    assert docs.count(consistency="strong") == ROWS + traffic.written
    verification = docs.verify(deadline=20.0)
    assert verification.ok, verification.differences


def scale(db: headrace.Database, workers: int) -> None:
    db.dask.cluster.scale(workers)
    until = time.monotonic() + 30
    while len(db.workers) != workers:
        assert time.monotonic() < until, f"there are {len(db.workers)} workers"
        time.sleep(0.05)


def test_a_worker_joins_is_filled_and_is_emptied_again(scaled: headrace.Database, docs: headrace.Collection) -> None:
    before = set(scaled.workers)
    with Traffic(docs) as traffic:
        scale(scaled, 3)
        (new,) = set(scaled.workers) - before
        first = min(before)
        scaled.drain(first, deadline=60.0)
        shares = {share["address"]: share for share in docs.status()["workers"]}
        assert (shares[first]["rows"], shares[first]["state"]) == (0, "drained")
        assert shares[new]["rows"] > 0, "nobody took over"
        assert traffic.searched > 0
    complete(docs, traffic)
    scaled.drain(first, undo=True)
    with pytest.raises(ClusterError, match="no worker here"):
        scaled.drain("tcp://127.0.0.1:1")
    scale(scaled, 2)
    complete(docs, traffic)


def test_the_last_worker_cannot_be_emptied(scaled: headrace.Database, docs: headrace.Collection) -> None:
    one, other = sorted(scaled.workers)[:2]
    scaled.drain(one)
    with pytest.raises(ClusterError, match="the last worker that holds"):
        scaled.drain(other)
    scaled.drain(one, undo=True)
