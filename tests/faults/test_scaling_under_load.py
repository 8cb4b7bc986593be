"""A worker joins and one leaves while records come as fast as they go: copies agree, and reads go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import headrace
from benchmarks.fault_scenes import joins_and_leaves
from benchmarks.fault_stage import Stage
from headrace.pipeline.client import Database
from headrace.streams.broker import EmbeddedBroker
from tests.faults.conftest import Kept

pytestmark = pytest.mark.slow

COMMAND = "pytest tests/faults/test_scaling_under_load.py"
SEED = 20261126


@pytest.fixture(scope="module")
def growing() -> Iterator[Database]:
    with headrace.connect(workers=2, processes=True, backend="host") as db:
        yield db


def test_a_worker_joins_and_one_leaves_at_full_ingest(growing: Database, broker: EmbeddedBroker, kept: Kept) -> None:
    with Stage(growing, broker, "scaled", seed=SEED, command=COMMAND) as stage:
        # No promise for p99 here: where cores are few, the start of a process alone doubles it. The benchmark holds it.
        kept(joins_and_leaves(stage, before=2.0, times=None))
