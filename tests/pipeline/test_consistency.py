"""What each level of consistency promises: what it waits for, what it does not, and what it says when it waited in vain."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import headrace
from headrace.cluster.replica import Replica
from headrace.gpu.errors import ConfigError, ConsistencyTimeout
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker

DIM = 4


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=DIM).astype(np.float32)


def row(row_id: str, number: int = 0) -> dict[str, Any]:
    return {"id": row_id, "vector": vector(number), "n": number}


@pytest.fixture
def collection(db: Database, broker: EmbeddedBroker, topic: str) -> Iterator[Collection]:
    made = db.create_collection(topic, dim=DIM, replicas=2)
    made.ingest(broker.bootstrap)
    made.upsert([row("first", 1)], wait="searchable")
    yield made
    db.drop_collection(topic)


@pytest.fixture
def other(db: Database, collection: Collection) -> Iterator[Collection]:
    """The same collection in a client of its own, which knows nothing of what the first one writes."""
    with headrace.connect(db.address) as elsewhere:
        yield elsewhere.collection(collection.name)


@contextmanager
def nothing_applied(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[list[int]]:
    """While this lasts, no copy of the collection takes anything in; counts the tries."""
    apply = Replica.apply
    held: list[int] = []

    def wait(self: Replica, *args: Any) -> Any:
        if self.state.spec.name != name:
            return apply(self, *args)
        held.append(len(held))
        raise headrace_busy

    headrace_busy = RuntimeError("held up by a test")
    with monkeypatch.context() as patch:
        patch.setattr(Replica, "apply", wait)
        yield held


def soon(condition: Callable[[], object], deadline: float = 10.0) -> None:
    until = time.monotonic() + deadline
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)
