"""Kafka may deliver again, and in another order: the index is the same as after a single delivery, bit for bit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.gpu.backend import Backend, resolve
from headrace.gpu.store import StoreSettings
from headrace.pipeline.client import Collection, Database
from headrace.pipeline.ingest import Ingest, IngestSettings
from headrace.streams.batches import RawBatch
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.encode import encode_json
from headrace.streams.producer import RecordProducer

DIM = 8
COUNT = 1000
ME = "tcp://me:1"

Record = tuple[bytes, bytes | None]


def records() -> list[Record]:
    """1,000 records of 300 ids, every ninth a delete."""
    random = np.random.default_rng(9)
    made: list[Record] = []
    for number in range(COUNT):
        row_id = f"r{random.integers(300)}"
        if number % 9 == 8:
            made.append((row_id.encode(), None))
        else:
            made.append(encode_json(row_id, vector=random.normal(size=DIM), attributes={"n": number}))
    return made


RECORDS = records()


def batch(rows: Sequence[int], ranges: dict[int, tuple[int, int]]) -> RawBatch:
    """Some of the records as the source would hand them on, their offset the number of the record."""
    return RawBatch(
        topic="docs",
        keys=[RECORDS[row][0] for row in rows],
        values=[RECORDS[row][1] for row in rows],
        headers=[None for _ in rows],
        topic_partitions=np.zeros(len(rows), dtype=np.int32),
        offsets=np.array(rows, dtype=np.int64),
        timestamps=np.array(rows, dtype=np.int64),
        ranges=ranges,
        pulled=0.0,
    )


def stretch(low: int, high: int) -> RawBatch:
    return batch(range(low, high), {0: (low, high)})


class LoneNode:
    """A worker without a cluster around it."""

    address = ME

    def __init__(self) -> None:
        self.backend: Backend = resolve("host")

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        raise AssertionError(f"{op} was sent to {address}")

    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
        assert op == "learn", f"{op} was asked of the scheduler"
        return {"schema": dict(message["schema"])}

    def clock(self) -> float:
        return time.time()

    def maintain(self, replica: Replica) -> None:
        replica.store.maintain()

    def adopt_soon(self, state: CollectionState) -> None:
        raise AssertionError("there is no newer state")

    def alarm(self, collection: str, text: str) -> None:
        raise AssertionError(text)


Feed = Callable[[Sequence[RawBatch], bool], Awaitable[Replica]]


@pytest.fixture
async def feed() -> AsyncIterator[Feed]:
    """Send batches through the whole ingest graph of a new replica, one after the other or all at once."""
    executor = ThreadPoolExecutor(1)

    async def through(batches: Sequence[RawBatch], at_once: bool = False) -> Replica:
        state = CollectionState(
            spec=CollectionSpec("docs", dim=DIM, metric="l2"),
            codebook=first_codebook(DIM),
            members={ME: "active"},
            copies={0: (ME,)},
            serving={0: (ME,)},
            source=Source("nowhere:1", "docs", 1, "json", {0: 0}),
        )
        node = LoneNode()
        replica = Replica(state, ME, node.backend, StoreSettings(seal_rows=64))
        ingest = Ingest(node, replica, None, executor, IngestSettings())
        if at_once:
            await asyncio.gather(*(ingest.source.emit(one, asynchronous=True) for one in batches))
        else:
            for one in batches:
                await ingest.source.emit(one, asynchronous=True)
        return replica

    yield through
    executor.shutdown()


def contents(replica: Replica) -> tuple[Any, ...]:
    digests, stamp = replica.store.digests()
    rows = sorted((row.id, row.offset, row.attributes["n"]) for chunk in replica.store.scan() for row in chunk)
    return digests, stamp, rows


def expected() -> list[tuple[str, int, int]]:
    last = {key.decode(): number for number, (key, _) in enumerate(RECORDS)}
    return sorted((row_id, number, number) for row_id, number in last.items() if RECORDS[number][1] is not None)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("size", [7, 90, COUNT])
async def test_twice_and_out_of_order(feed: Feed, size: int, at_once: bool) -> None:
    once = [stretch(low, min(low + size, COUNT)) for low in range(0, COUNT, size)]
    single = contents(await feed(once, False))
    assert single[2] == expected()
    assert single[1] == {0: COUNT}
    again = [*once, *once]
    shuffled = [again[place] for place in np.random.default_rng(size).permutation(len(again))]
    assert contents(await feed(shuffled, at_once)) == single


async def test_another_order_within_a_batch(feed: Feed) -> None:
    single = contents(await feed([stretch(0, COUNT)], False))
    order = np.random.default_rng(1).permutation(COUNT).tolist()
    assert contents(await feed([batch([*order, *order], {0: (0, COUNT)})], False)) == single


async def test_a_lost_record_would_be_seen(feed: Feed) -> None:
    """The comparison can fail: without the last version of one id the digest is another."""
    single = contents(await feed([stretch(0, COUNT)], False))
    kept = [row for row in range(COUNT) if row != single[2][0][1]]
    assert contents(await feed([batch(kept, {0: (0, COUNT)})], False))[0] != single[0]


def digests(db: Database, collection: Collection) -> dict[str, Any]:
    """What each worker's copy adds up to."""
    return {
        worker: db.dask.sync(collection._async._call, worker, "digests", deadline=5.0, collection=collection.name)
        for worker in db.workers
    }


def test_redelivered_on_a_running_cluster(db: Database, broker: EmbeddedBroker, topic: str) -> None:
    name = f"{topic}-one"
    broker.create_topic(name, 1)
    collection = db.create_collection(name, dim=DIM, metric="l2", replicas=2)
    collection.ingest(broker.bootstrap)
    producer = RecordProducer(broker.bootstrap, name)
    producer.write([(key, value, None) for key, value in RECORDS], 10.0)
    producer.close()
    assert collection.count(consistency="strong") == len(expected())
    assert collection.verify().ok
    before = digests(db, collection)
    assert all([*map(list, answer["applied"])] == [[0, COUNT]] for answer in before.values())
    plugins = [worker.plugins["headrace"] for worker in db._owns[0].workers.values()]
    (ingest,) = [plugin._ingests[name] for plugin in plugins if name in plugin._ingests]

    async def again() -> None:
        halves = [stretch(COUNT // 2, COUNT), stretch(0, COUNT // 2)]
        await asyncio.gather(*(ingest.source.emit(half, asynchronous=True) for half in [*halves, *halves]))

    records_before = collection.status()["ingest"]["records"]
    db.dask.sync(again)
    assert collection.status()["ingest"]["records"] > records_before, "nothing was delivered again"
    assert digests(db, collection) == before
    assert sorted((row.id, row.offset, row.attributes["n"]) for row in collection.scan()) == expected()
    db.drop_collection(name)
