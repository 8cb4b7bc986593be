"""Brokers that go away, hang, or change leaders: nothing acknowledged is lost, nothing is written twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.fault_scenes import broker_away, leader_moves
from benchmarks.fault_stage import Stage
from headrace.pipeline.client import Database
from headrace.streams.broker import EmbeddedBroker
from tests.faults.conftest import Kept

pytestmark = pytest.mark.slow

COMMAND = "pytest tests/faults/test_broker_away.py"
SEED = 20261125


@pytest.fixture(scope="module")
def breakable() -> Iterator[EmbeddedBroker]:
    """A broker of its own: the others' tests must not feel what is done to it."""
    with EmbeddedBroker() as running:
        yield running


@pytest.mark.parametrize("hangs", [False, True], ids=["down", "hangs"])
def test_a_broker_that_is_away_costs_nothing(
    processes: Database, breakable: EmbeddedBroker, kept: Kept, hangs: bool
) -> None:
    with Stage(processes, breakable, f"broker-{hangs}".lower(), seed=SEED, command=COMMAND, base=200) as stage:
        kept(broker_away(stage, away=3.0, hangs=hangs))


def test_leaders_move_and_nobody_notices(processes: Database, kept: Kept) -> None:
    with (
        EmbeddedBroker(brokers=3) as brokers,
        Stage(processes, brokers, "leaders", seed=SEED, command=COMMAND, base=200) as stage,
    ):
        kept(leader_moves(stage))
