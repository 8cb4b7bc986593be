"""Worker processes with roles: one that reads the topic is killed, and one that holds rows is told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import headrace
from benchmarks.fault_cluster import SchedulerProcess
from headrace.gpu.errors import ClusterError
from headrace.streams.broker import EmbeddedBroker

# Dask leaves sockets to a scheduler that was killed to the collector, which may come by at any time.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
]

DIM, ROWS = 8, 300


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).standard_normal(DIM).astype(np.float32)


def until(condition: Callable[[], Any], what: str, deadline: float = 90.0) -> None:
    end = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < end, f"after {deadline:g} s still not: {what}"
        time.sleep(0.05)


def started(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "headrace.pipeline.cli", *arguments, "--end-with-parent"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)


def roles_of(docs: headrace.Collection) -> dict[str, str]:
    return {worker["address"]: worker["role"] for worker in docs.status()["workers"]}


def have_come_back(db: headrace.Database, docs: headrace.Collection, workers: set[str]) -> bool:
    try:
        return db.workers.keys() == roles_of(docs).keys() == workers and not docs.status()["notes"]
    except ClusterError:  # the client has not heard of the next scheduler yet
        return False


def test_another_takes_over_from_a_reader_that_is_killed_and_a_holder_is_emptied_before_it_ends(
    scheduler: SchedulerProcess, broker: EmbeddedBroker, topic: str
) -> None:
    address = scheduler.address
    parts = [started("worker", address, "--role", role) for role in ("search", "search", "search", "ingest")]
    # By itself, without a nanny that would start it again at once.
    alone = {**os.environ, "DASK_HEADRACE__WORKER__ROLE": "ingest"}
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1"]
    parts.append(subprocess.Popen([*worker, "--memory-limit", "0", "--no-dashboard"], env=alone))
    try:
        with headrace.connect(address, timeout=60) as db:
            until(lambda: len(db.workers) == 5, "all workers are there")
            docs = db.create_collection(topic, dim=DIM, cells=8, replicas=2)
            docs.ingest(broker.bootstrap, topic)
            docs.upsert([{"id": f"d{n}", "vector": vector(n)} for n in range(ROWS)], wait="searchable", deadline=60)
            roles = roles_of(docs)
            assert sorted(roles.values()) == ["ingest", "ingest", "search", "search", "search"]
            holders = {holder for each in docs.status()["placement"].values() for holder in each}
            assert holders <= {address for address, role in roles.items() if role == "search"}

            parts[-1].send_signal(signal.SIGKILL)
            for number in range(50):  # search goes on, whoever reads the topic
                assert docs.search(vector(number), limit=1, consistency="eventual")[0].id == f"d{number}"
            docs.upsert([{"id": f"e{n}", "vector": vector(n)} for n in range(ROWS)], wait="searchable", deadline=90)
            until(lambda: len(docs.status()["workers"]) == 4, "the one that was killed is out")

            parts[0].send_signal(signal.SIGTERM)
            assert parts[0].wait(90) == 0
            until(lambda: len(docs.status()["workers"]) == 3, "the one that was ended is out")
            status = docs.status()
            assert (status["incarnation"], status["alarms"]) == (0, []), json.dumps(status["alarms"])
            until(lambda: not docs.status()["notes"], "every cell has its copies")
            assert docs.count(consistency="strong", deadline=30) == 2 * ROWS
            assert docs.verify(deadline=30).ok

            # Another scheduler hears from the workers what each is there for.
            roles = roles_of(docs)
            scheduler.kill()
            scheduler.start()
            scheduler.wait()
            until(lambda: have_come_back(db, docs, set(roles)), "all have come back")
            docs.upsert([{"id": f"f{n}", "vector": vector(n)} for n in range(ROWS)], wait="searchable", deadline=90)
            assert roles_of(docs) == roles
            late = db.create_collection(f"{topic}-late", dim=DIM, replicas=3)
            placed = [*docs.status()["placement"].values(), *late.status()["placement"].values()]
            assert {holder for each in placed for holder in each} == {
                worker for worker, role in roles.items() if role == "search"
            }
            assert docs.verify(deadline=30).ok
            db.end_cluster()
    finally:
        for part in parts:
            part.terminate()
        for part in parts:
            try:
                part.wait(60)
            except subprocess.TimeoutExpired:
                part.kill()
                part.wait()
            if part.stdin is not None:
                part.stdin.close()
