"""Workers that are being read and written to die or hang: no read fails, few are late, and no copy lies afterwards."""

from __future__ import annotations

import pytest

from benchmarks.fault_scenes import unread_hangs, worker_lost
from benchmarks.fault_stage import Stage
from headrace.pipeline.client import Database
from headrace.streams.broker import EmbeddedBroker
from tests.faults.conftest import Kept

pytestmark = pytest.mark.slow

COMMAND = "pytest tests/faults/test_reads_under_fire.py"
SEED = 20261124


def test_a_worker_that_is_read_dies(processes: Database, broker: EmbeddedBroker, kept: Kept) -> None:
    with Stage(processes, broker, "read-killed", seed=SEED, command=COMMAND, base=1000) as stage:
        kept(worker_lost(stage, before=2.0))


def test_a_worker_that_is_read_hangs(processes: Database, broker: EmbeddedBroker, kept: Kept) -> None:
    # Of an index that misses nothing, so that a row which no copy was asked for cannot pass for a matter of recall.
    with Stage(processes, broker, "read-hung", seed=SEED, command=COMMAND, index="flat") as stage:
        kept(worker_lost(stage, hangs=5.0, before=2.0))


def test_a_worker_hangs_and_nothing_is_written(processes: Database, broker: EmbeddedBroker, kept: Kept) -> None:
    with Stage(processes, broker, "idle-hung", seed=SEED, command=COMMAND, base=1000) as stage:
        kept(unread_hangs(stage, hangs=6.0, before=1.0))
