"""A worker that is killed again and again, as one that runs out of memory is: its nanny never gives it up."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress

import numpy as np
import pytest

import headrace
from headrace.streams.broker import EmbeddedBroker
from tests.faults.conftest import Quiet

pytestmark = pytest.mark.slow

DIM, ROWS = 8, 50
DASKS_PATIENCE = 15.0
"""Seconds after a worker's end at which Dask looks whether it is back, and by default closes its nanny if it is not."""


def test_a_worker_killed_again_and_again_is_started_again(
    broker: EmbeddedBroker, topic: str, until_quiet: Quiet
) -> None:
    with headrace.connect(workers=2, processes=True, backend="host") as db:
        docs = db.create_collection(topic, dim=DIM, replicas=2)
        docs.ingest(broker.bootstrap)
        rng = np.random.default_rng(0)
        rows = [{"id": f"d{n}", "vector": rng.standard_normal(DIM)} for n in range(ROWS)]
        docs.upsert(rows, wait="searchable")
        nannies = set(db.dask.cluster.workers)
        stays = next(iter(db.workers.values()))
        kills: list[float] = []
        # Dead for most of the time, also at the moments at which Dask looks after the first kills.
        until = time.monotonic() + DASKS_PATIENCE + 10
        while time.monotonic() < until or len(kills) < 3:
            for pid in set(db.workers.values()) - {stays}:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    kills.append(time.monotonic())
            time.sleep(0.02)
        status = until_quiet(docs, workers=2)
        assert set(db.dask.cluster.workers) == nannies, "a nanny was closed"
        assert stays in db.workers.values()
        assert status["incarnation"] == 0
        assert docs.count(consistency="strong") == ROWS
        assert docs.verify().ok
