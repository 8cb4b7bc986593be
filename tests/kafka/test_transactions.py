"""Transactions of other producers: committed ones become searchable, aborted ones never do, and nothing waits for ever.

A read_committed consumer is given nothing past the *last stable offset*, the first offset of an open transaction; each
transaction that ends leaves a marker in the log, an offset that no consumer is ever given.
"""

from __future__ import annotations

import queue
import time

import numpy as np
import pytest

from headrace.gpu.errors import ConsistencyTimeout
from headrace.pipeline.client import Collection
from headrace.streams.reader import Reader, ReaderSettings
from tests.kafka.conftest import Until
from tests.kafka.real_broker import RealBroker
from tests.kafka.writing import Transactions, rows, vector

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


def ids(collection: Collection, **options: object) -> set[str]:
    return {str(hit.id) for hit in collection.search(vector(0), limit=1000, **options)}


def test_committed_is_searchable_and_aborted_never_is(kafka: RealBroker, collection: Collection, name: str) -> None:
    transactions = Transactions(kafka.bootstrap, name, name)
    wanted = set()
    for turn in range(6):
        numbers = range(100 * turn, 100 * turn + 10)
        transactions.send(*numbers)
        if turn % 2:
            transactions.abort()
        else:
            transactions.commit()
            wanted |= {f"r{number}" for number in numbers}
    collection.upsert(rows(5000), wait="searchable")  # its topic partition has been applied up to the end
    collection.upsert(rows(*range(5001, 5020)), wait="searchable")  # and the other one's too
    wanted |= {f"r{number}" for number in range(5000, 5020)}
    assert ids(collection, consistency="strong") == wanted
    assert collection.verify().ok


@pytest.mark.parametrize("end", ["commit", "abort"])
def test_reads_do_not_wait_for_the_marker_at_the_end(
    kafka: RealBroker, collection: Collection, name: str, until: Until, end: str
) -> None:
    """After the marker nothing else comes that would carry the watermark past it."""
    transactions = Transactions(kafka.bootstrap, name, name)
    collection.upsert(rows(*range(20)), wait="searchable")
    took = []
    for turn in range(10):
        transactions.send(*range(100 * turn + 100, 100 * turn + 120))
        getattr(transactions, end)()
        started = time.perf_counter()
        assert collection.count(consistency="strong", deadline=5.0) >= 20
        took.append(1e3 * (time.perf_counter() - started))
        assert collection.count(consistency="session", deadline=5.0) >= 20
    print(f"\nstrong read after {end}, ms: {np.round(sorted(took), 1)}")
    expected = 220 if end == "commit" else 20
    until("all is counted", lambda: collection.count(consistency="strong") == expected)
    until("no lag is left", lambda: collection.status()["ingest"]["lag"] == 0)


def test_a_marker_is_passed_without_another_fetch(kafka: RealBroker, name: str) -> None:
    """The next fetch would tell, but the broker holds that back while there is nothing to give."""
    kafka.create_topic(name, 1)
    batches: queue.SimpleQueue = queue.SimpleQueue()
    settings = ReaderSettings(fetch_wait=15.0, batches_in_flight=99, kafka={"socket.timeout.ms": "60000"})
    reader = Reader(kafka.bootstrap, name, name, batches.put, pytest.fail, settings)
    reader.assign({0: 0})
    reader.start()
    transactions = Transactions(kafka.bootstrap, name, name)
    try:
        reached, records = 0, 0
        for turn, end in enumerate((transactions.commit, transactions.commit, transactions.abort)):
            transactions.send(turn)
            end()
            while reached < 2 * turn + 2:
                batch = batches.get(timeout=10.0)
                assert batch.ranges[0][0] == reached
                reached = batch.ranges[0][1]
                records += len(batch.keys)
        assert records == 2
    finally:
        reader.stop()


def test_an_open_transaction_delays_and_does_not_wedge(
    kafka: RealBroker, collection: Collection, name: str, until: Until
) -> None:
    transactions = Transactions(kafka.bootstrap, name, name)
    before = rows(*range(20))
    collection.upsert(before, wait="searchable")
    with transactions.open(*range(100, 120)):
        # Strong is up to what Kafka would give any reader of committed records; it does not wait for who knows whom.
        assert ids(collection, consistency="strong", deadline=5.0) == {f"r{number}" for number in range(20)}
        # A write behind the open transaction is acknowledged, and not to be had before that ends: said, not hidden.
        collection.upsert(rows(*range(200, 220)))
        with pytest.raises(ConsistencyTimeout, match="had not applied"):
            collection.count(consistency="session", deadline=0.5)
        assert ids(collection, consistency="eventual") == {f"r{number}" for number in range(20)}
        assert collection.status()["alarms"] == []
    assert collection.count(consistency="session", deadline=10.0) >= 40
    until("all three are there", lambda: collection.count(consistency="strong") == 60)


def test_a_producer_that_dies_in_a_transaction_holds_nothing_up_for_long(
    kafka: RealBroker, collection: Collection, name: str
) -> None:
    """Kafka aborts it after the transaction's own timeout."""
    Transactions(kafka.bootstrap, name, name, timeout_ms=1500).send(*range(100, 120))
    written = collection.upsert(rows(*range(20)), wait="searchable", deadline=20.0)
    assert written.count == 20
    assert ids(collection, consistency="strong") == {f"r{number}" for number in range(20)}
