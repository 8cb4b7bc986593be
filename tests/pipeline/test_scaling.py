"""Workers that come, go and are emptied while records flow: no copy lacks anything, and no read fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import dask
import numpy as np
import pytest

import headrace
from headrace.gpu.errors import ClusterError, ConfigError
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
    until = time.monotonic() + 60
    while len(db.workers) != workers:
        assert time.monotonic() < until, f"there are {len(db.workers)} workers"
        time.sleep(0.05)


def nothing_was_lost(docs: headrace.Collection) -> None:
    status = docs.status()
    assert status["incarnation"] == 0
    assert status["alarms"] == []


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


def test_two_workers_less_at_once_lose_nothing(scaled: headrace.Database, docs: headrace.Collection) -> None:
    before = set(scaled.workers)
    with Traffic(docs) as traffic:
        for close in (scaled.scale, lambda workers: scale(scaled, workers)):  # the latter is Dask's own
            scaled.scale(4)
            assert len(docs.status()["workers"]) == 4
            for worker in before:  # those that will go hold all there is
                scaled.drain(worker, deadline=60.0)
            for worker in before:
                scaled.drain(worker, undo=True)
            assert before.isdisjoint(holders(docs))
            close(2)
            assert set(scaled.workers) == before, "the newest ones go"
            nothing_was_lost(docs)
    complete(docs, traffic)
    nothing_was_lost(docs)


def test_scaling_to_what_cannot_be(scaled: headrace.Database) -> None:
    for number in (0, -1, 1.5, True, "two"):
        with pytest.raises(ConfigError, match="give a whole number, 1 or more"):
            scaled.scale(number)  # type: ignore[arg-type]


def test_roles(scaled: headrace.Database, docs: headrace.Collection) -> None:
    first = set(scaled.workers)
    with Traffic(docs) as traffic:
        with dask.config.set({"headrace.worker.role": "ingest"}):
            scaled.scale(3)
        (ingest,) = set(scaled.workers) - first
        with dask.config.set({"headrace.worker.role": "search"}):
            scaled.scale(5)
        search = set(scaled.workers) - first - {ingest}
        for worker in first:
            scaled.drain(worker, deadline=60.0)
        status = docs.status()
        roles = {worker["address"]: worker["role"] for worker in status["workers"]}
        assert roles == {**dict.fromkeys(first, "both"), ingest: "ingest", **dict.fromkeys(search, "search")}
        assert holders(docs) == search
        assert reading(docs) == {ingest}
        write = docs.upsert({"id": "last", "vector": vector(ROWS)}, wait="searchable")
        assert write.count == 1
        with pytest.raises(ClusterError, match="last worker that may read the topic"):
            scaled.drain(ingest)
    assert docs.count(consistency="strong") == ROWS + traffic.written + 1
    assert docs.verify(deadline=20.0).ok
    assert len({row.id for row in docs.scan()}) == ROWS + traffic.written + 1
    assert list(docs.scan(worker=ingest)) == []
    for worker in first:
        scaled.drain(worker, undo=True)
    scaled.scale(2)
    nothing_was_lost(docs)
    assert {worker["role"] for worker in docs.status()["workers"]} == {"both"}


def holders(docs: headrace.Collection) -> set[str]:
    return {holder for each in docs.status()["placement"].values() for holder in each}


def reading(docs: headrace.Collection) -> set[str]:
    """Workers that read the topic."""
    state = docs._async._router  # what a client knows: nothing that people are shown says it
    return set(docs._sync(state.state, newest=True).readers.values())


def test_a_collection_whose_workers_may_only_read_or_only_hold_waits(broker: EmbeddedBroker) -> None:
    broker.create_topic("roles", 2)
    with dask.config.set({"headrace.worker.role": "search"}):
        db = headrace.connect(workers=1, backend="host")
    with db:
        docs = db.create_collection("roles", dim=DIM, cells=2, replicas=1)
        docs.ingest(broker.bootstrap, "roles")
        docs.upsert({"id": "a", "vector": vector(1)})
        status = docs.status()
        assert status["state"] == "degraded"
        assert any("may read the topic" in note for note in status["notes"])
        with dask.config.set({"headrace.worker.role": "ingest"}):
            db.scale(2)
        assert docs.count(consistency="strong", deadline=60.0) == 1
        assert docs.status()["state"] == "healthy"


def test_without_a_worker_that_may_hold_rows_no_collection_is_made() -> None:
    with dask.config.set({"headrace.worker.role": "ingest"}):
        db = headrace.connect(workers=1, backend="host")
    with db, pytest.raises(ClusterError, match="no worker is ready to hold a collection"):
        db.create_collection("nobody", dim=DIM)


def test_more_scans_than_a_worker_once_took_are_read_to_their_ends(docs: headrace.Collection) -> None:
    scans = [docs.scan() for _ in range(40)]
    firsts = [next(scan).id for scan in scans]
    for scan in scans[::2]:
        scan.close()  # the worker is told so
    for first, scan in zip(firsts[1::2], scans[1::2], strict=True):
        assert len({first, *(row.id for row in scan)}) == ROWS
