"""One Apache Kafka for the session, a topic for each test, and its log where a test fails."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from headrace.pipeline.client import Collection, Database
from tests.kafka.real_broker import Missing, RealBroker
from tests.kafka.writing import DIM

_NUMBERS = itertools.count()

Until = Callable[..., None]


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealBroker]:
    """Apache Kafka, running; a test that kills it starts it again."""
    try:
        broker = RealBroker(tmp_path_factory.mktemp("kafka"))
    except Missing as reason:
        pytest.skip(str(reason))
    with broker:
        yield broker


@pytest.fixture
def name() -> str:
    """A name that no other topic, collection or transaction has."""
    return f"real-{next(_NUMBERS)}"


@pytest.fixture
def collection(kafka: RealBroker, db: Database, name: str) -> Iterator[Collection]:
    """An empty collection with two copies that reads a topic of its name, which has 2 topic partitions."""
    kafka.create_topic(name, 2)
    collection = db.create_collection(name, dim=DIM, replicas=2)
    collection.ingest(kafka.bootstrap)
    yield collection
    db.drop_collection(name)


@pytest.fixture(scope="session")
def until() -> Until:
    """Wait until a condition holds, and fail with what it was about if it never does."""

    def wait(what: str, condition: Callable[[], Any], deadline: float = 60.0) -> None:
        end = time.monotonic() + deadline
        while not condition():
            assert time.monotonic() < end, f"not so after {deadline:g} s: {what}"
            time.sleep(0.01)

    return wait


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    broker = getattr(item, "funcargs", {}).get("kafka")
    if report.failed and isinstance(broker, RealBroker):
        report.sections.append(("the broker's log", broker.tail()))
    return report
