"""What every test may use: one embedded broker for the session, a fresh topic for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from hypothesis import settings

import headrace
from headrace.pipeline.client import Database
from headrace.streams.broker import EmbeddedBroker

# A shared machine may stall for longer than the default of 200 ms.
settings.register_profile("headrace", deadline=None)
settings.load_profile("headrace")

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def broker() -> Iterator[EmbeddedBroker]:
    """A running broker that tests share: a test that breaks brokers starts one of its own."""
    with EmbeddedBroker() as running:
        yield running


@pytest.fixture
def topic(broker: EmbeddedBroker) -> str:
    """The name of an empty topic with 4 topic partitions."""
    name = f"test-{next(_NUMBERS)}"
    broker.create_topic(name, 4)
    return name


@pytest.fixture(scope="session")
def db() -> Iterator[Database]:
    """A cluster of two workers in this process that tests share: a test that breaks workers starts one of its own."""
    with headrace.connect(workers=2, backend="host") as running:
        yield running
