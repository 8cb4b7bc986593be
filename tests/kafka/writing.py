"""What the tests write: rows whose vectors follow from their numbers, and transactions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from confluent_kafka import Producer

from headrace.streams.clients import KafkaLog
from headrace.streams.encode import encode_json

DIM = 8


def vector(number: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng([7, number]).normal(size=DIM).astype(np.float32)


def row(number: int, **attributes: Any) -> dict[str, Any]:
    return {"id": f"r{number}", "vector": vector(number), "n": number, **attributes}


def rows(*numbers: int) -> list[dict[str, Any]]:
    return [row(number) for number in numbers]


class Transactions:
    """A transactional producer, as another program would have it."""

    def __init__(self, bootstrap: str, topic: str, name: str, timeout_ms: int = 60_000) -> None:
        self._topic = topic
        self.producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "transactional.id": name,
                "transaction.timeout.ms": timeout_ms,
                "partitioner": "murmur2_random",
                "linger.ms": 0,
            },
            logger=KafkaLog(),
        )
        self.producer.init_transactions(20.0)

    def send(self, *numbers: int) -> None:
        """Begin a transaction and have the broker take these rows; it stays open."""
        self.producer.begin_transaction()
        for number in numbers:
            key, value = encode_json(f"r{number}", vector=vector(number), attributes={"n": number})
            self.producer.produce(self._topic, key=key, value=value)
        assert self.producer.flush(20.0) == 0

    def commit(self) -> None:
        self.producer.commit_transaction(20.0)

    def abort(self) -> None:
        self.producer.abort_transaction(20.0)

    @contextmanager
    def open(self, *numbers: int) -> Iterator[None]:
        """A transaction that is open within the block and committed after it."""
        self.send(*numbers)
        try:
            yield
        finally:
            self.commit()
