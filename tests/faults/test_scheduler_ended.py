"""The scheduler is ended in order, by SIGTERM or Ctrl-C, and another takes its place: workers stay, as when it dies.

And `headrace up`, whose Ctrl-C ends everything.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import headrace
from benchmarks.fault_cluster import SchedulerProcess, command, end
from headrace.pipeline.client import Database
from headrace.streams.broker import EmbeddedBroker
from tests.faults.test_worker_killed import DIM, Quiet, vector

# Dask leaves sockets to a scheduler that was killed to the collector, which may come by at any time.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

SOON = 90.0


def until(what: str, condition: Callable[[], object], deadline: float = SOON) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"not so after {deadline:g} s: {what}"
        time.sleep(0.05)


def workers_of(cluster: Database) -> dict[str, int]:
    try:
        return cluster.workers
    except headrace.ClusterError:
        return {}


@pytest.fixture
def cluster(scheduler: SchedulerProcess) -> Iterator[Database]:
    workers = command("worker", scheduler.address, "--workers", "2")
    try:
        with headrace.connect(scheduler.address, backend="host", timeout=60) as db:
            until("two workers are there", lambda: len(db.workers) == 2)
            yield db
    finally:
        end(workers)


def test_a_scheduler_that_is_ended_in_order_leaves_the_workers(
    scheduler: SchedulerProcess, cluster: Database, broker: EmbeddedBroker, topic: str, until_quiet: Quiet
) -> None:
    collection = cluster.create_collection(topic, dim=DIM, replicas=2)
    collection.ingest(broker.bootstrap)
    collection.upsert([{"id": f"r{n}", "vector": vector(n), "n": n} for n in range(50)], wait="searchable")
    before = cluster.workers
    for how in (signal.SIGTERM, signal.SIGINT):
        process = scheduler._process
        process.send_signal(how)
        assert process.wait(30) == 0
        assert process.stdin is not None
        process.stdin.close()
        for _ in range(5):
            collection.upsert([{"id": "away", "vector": vector(99), "n": 99}], wait="searchable", deadline=20.0)
            assert [hit.id for hit in collection.search(vector(7), limit=1)] == ["r7"]
            time.sleep(0.1)
        scheduler.start()
        scheduler.wait()
        until(f"the same workers are back after {how.name}", lambda: workers_of(cluster) == before)
        status = until_quiet(collection, workers=2)
        assert (status["incarnation"], status["alarms"]) == (0, [])
        assert collection.count(consistency="strong", deadline=20.0) == 51
        taken = status["ingest"]["records"]
        assert taken <= sum(status["workers"][0]["watermarks"].values()), "records were read more than once"


def test_up_outlives_its_schedulers_end_and_ctrl_c_ends_everything(
    tmp_path: Path, broker: EmbeddedBroker, topic: str, until_quiet: Quiet
) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        up = subprocess.Popen(
            [sys.executable, "-m", "headrace.pipeline.cli", "up", "--port", "0", "--dashboard", ":0"],
            stdout=file,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
    try:
        until("it runs", lambda: up.poll() is not None or b"Ctrl-C" in out.read_bytes())
        found = re.search(r"scheduler +(tcp://\S+)", out.read_text())
        assert found is not None, out.read_text()
        with headrace.connect(found[1], backend="host", timeout=60) as db:
            until("two workers are there", lambda: len(workers_of(db)) == 2)
            before = db.workers
            collection = db.create_collection(topic, dim=DIM, replicas=2)
            collection.ingest(broker.bootstrap)
            collection.upsert([{"id": "a", "vector": vector(1)}], wait="searchable")
            (scheduler,) = [child for child in psutil.Process(up.pid).children() if "scheduler" in child.cmdline()]
            scheduler.terminate()
            until("it is gone", lambda: not scheduler.is_running() or scheduler.status() == psutil.STATUS_ZOMBIE)
            until("the same workers are back with the next", lambda: workers_of(db) == before)
            assert until_quiet(collection, workers=2)["incarnation"] == 0
            assert [hit.id for hit in collection.search(vector(1), limit=1)] == ["a"]
        everybody = psutil.Process(up.pid).children(recursive=True)
        assert {process.pid for process in everybody} >= set(before.values())
        up.send_signal(signal.SIGINT)
        assert up.wait(60) == 0
        _, left = psutil.wait_procs(everybody, timeout=SOON)
        assert not left, "Ctrl-C left processes behind"
    finally:
        up.kill()
        up.wait()
