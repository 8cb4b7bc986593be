"""Micro-batches to two workers that have little memory: what fits goes in, what does not waits, and is not lost."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.cluster.wire import batch_from_wire, offsets_from_wire
from headrace.gpu.backend import resolve
from headrace.gpu.errors import ClusterError, HeadraceError, StaleEpoch
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.store import StoreSettings
from headrace.pipeline.figures import Figures
from headrace.pipeline.ingest_settings import IngestSettings
from headrace.pipeline.micro_batch import MicroBatch
from headrace.pipeline.preparing import Preparer, texts_to_encode
from headrace.pipeline.sending import Sender
from headrace.streams.batches import RawBatch, Refusal
from headrace.streams.encode import encode_json

DIM = 16
LIMIT = 400_000
ME, OTHER, NEW = "tcp://me:1", "tcp://other:1", "tcp://new:1"
HOST = resolve("host")


def state_of(*workers: str, epoch: int = 1) -> CollectionState:
    return CollectionState(
        spec=CollectionSpec("docs", dim=DIM, metric="l2", index=IndexSpec("flat")),
        codebook=first_codebook(DIM),
        epoch=epoch,
        members=dict.fromkeys(workers, "active"),
        copies={0: workers},
        serving={0: workers},
        source=Source("nowhere:1", "docs", 1, "json", {0: 0}),
    )


class Cluster:
    """The worker that sends, and others beside it in the same process."""

    address, backend = ME, HOST

    def __init__(self, limits: dict[str, int]) -> None:
        self.newest = state_of(*limits)
        self.replicas = {worker: self.replica(worker, limit) for worker, limit in limits.items()}
        self.silent: set[str] = set()
        self.scheduler_lost = False
        self.alarms: list[str] = []
        self.letters: list[tuple[int, str]] = []
        self.sizes: list[int] = []
        self.sender = Sender(self, self.replicas[ME], IngestSettings(retry_delay_max=0.05), {}, self.refuse)

    def replica(self, worker: str, limit: int) -> Replica:
        settings = StoreSettings(seal_rows=1 << 14, memory_limit=limit)
        return Replica(self.newest, worker, HOST, settings)

    async def refuse(self, raw: RawBatch, refusals: list[Refusal]) -> None:
        self.letters += [(int(raw.offsets[refusal.row]), refusal.reason) for refusal in refusals]

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if address in self.silent:
            raise ClusterError(f"{address} did not answer")
        if op == "describe":
            state = self.replicas[address].state
            return {"state": None if state.epoch == message["epoch"] else state.to_wire()}
        assert op == "apply"
        batch = batch_from_wire(message["batch"])
        self.sizes.append(len(batch))
        ranges = {tp: (low, high) for tp, low, high in message["ranges"]}
        stable = offsets_from_wire(message["stable"])
        applied = self.replicas[address].apply(batch, ranges, stable, message["epoch"])
        if applied is None:
            raise StaleEpoch("older")
        return {"missing": list(applied.missing)}

    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
        if op == "learn":
            return {"schema": dict(message["schema"])}
        if self.scheduler_lost:
            raise ClusterError("the scheduler cannot be reached")
        return {"state": self.newest.to_wire()}

    def clock(self) -> float:
        return 0.0

    def maintain(self, replica: Replica) -> None:
        while replica.store.maintain():
            pass

    def adopt_soon(self, state: CollectionState) -> None:
        for replica in self.replicas.values():
            replica.adopt(state)

    def alarm(self, collection: str, text: str) -> None:
        self.alarms.append(text)

    def topic_found(self, *args: Any) -> None:
        raise AssertionError(args)

    def limit(self, bytes_: int) -> None:
        for replica in self.replicas.values():
            replica.store._budget.limit = bytes_

    def offsets_of(self, worker: str) -> dict[str, int]:
        """What a worker holds: id to offset."""
        return {str(row.id): row.offset for chunk in self.replicas[worker].store.scan() for row in chunk}

    def watermarks(self) -> list[int]:
        return [replica.watermarks[0] for replica in self.replicas.values()]


Records = list[tuple[str, dict[str, Any] | None]]


def raw_of(records: Records, first: int = 0) -> RawBatch:
    """Ids with their attributes, or None for a delete, at rising offsets."""
    random = np.random.default_rng(first)
    encoded = [
        (row_id.encode(), None)
        if attributes is None
        else encode_json(row_id, vector=random.normal(size=DIM), attributes=attributes)
        for row_id, attributes in records
    ]
    offsets = np.arange(first, first + len(records))
    return RawBatch(
        topic="docs",
        keys=[key for key, _ in encoded],
        values=[value for _, value in encoded],
        headers=[None] * len(records),
        topic_partitions=np.zeros(len(records), dtype=np.int32),
        offsets=offsets,
        timestamps=offsets,
        ranges={0: (first, first + len(records))},
        pulled=0.0,
    )


Send = Callable[[Cluster, Records, int], "asyncio.Task[MicroBatch]"]


@pytest.fixture
async def send() -> AsyncIterator[Send]:
    """Begin to send a batch, and take it back at the end where it still waits."""
    tasks: list[asyncio.Task[MicroBatch]] = []
    with ThreadPoolExecutor(1) as executor:

        async def through(cluster: Cluster, raw: RawBatch) -> MicroBatch:
            preparer = Preparer(cluster, cluster.newest, "json", None, executor, 1 << 24)
            batch = MicroBatch(raw)
            await preparer.decode(batch)
            assert batch.decoded is not None
            await preparer.to_vectors(batch, texts_to_encode(batch.decoded))
            await cluster.sender.everywhere(batch, raw.ranges)
            return batch

        def begin(cluster: Cluster, records: Records, first: int) -> asyncio.Task[MicroBatch]:
            tasks.append(asyncio.ensure_future(through(cluster, raw_of(records, first))))
            return tasks[-1]

        yield begin
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not holds():
            await asyncio.sleep(0.005)


def some(count: int, first: int = 0) -> Records:
    return [(f"r{n}", {"story": f"{n} " + "x" * 1000}) for n in range(first, first + count)]


def is_waiting(cluster: Cluster) -> bool:
    return bool(cluster.sender.full)


async def test_what_fits_of_a_batch_that_never_would_is_searchable(send: Send) -> None:
    cluster = Cluster({ME: LIMIT, OTHER: LIMIT})
    await send(cluster, some(10), 0)
    sending = send(cluster, [*some(500, 10), ("r3", None), ("r4", {"story": "new"})], 10)
    await until(lambda: is_waiting(cluster))
    held = cluster.offsets_of(ME)
    assert 20 < len(held) < 400
    assert cluster.offsets_of(OTHER) == held
    assert "r3" not in held, "deletes at the end of the batch have gone, they make room"
    assert sorted(held.values()) == sorted({*range(len(held) + 1)} - {3}), "in the order of the log"
    assert cluster.watermarks() == [10, 10], "not before all are applied"
    assert cluster.sender.full == {ME, OTHER}
    assert len(cluster.alarms) == 2
    waiting = len(cluster.sizes)
    await until(lambda: len(cluster.sizes) > waiting + 3)
    assert set(cluster.sizes[waiting:]) == {1}, "only the record that waits is sent again"
    cluster.limit(100 * LIMIT)
    await sending
    assert cluster.offsets_of(ME) == cluster.offsets_of(OTHER)
    assert len(cluster.offsets_of(ME)) == 509
    assert cluster.offsets_of(ME)["r4"] == 511
    assert cluster.watermarks() == [512, 512]
    assert not cluster.sender.full
    assert not cluster.letters


async def test_one_that_is_full_holds_nobody_else_up(send: Send) -> None:
    """The other has the whole batch from the first attempt."""
    cluster = Cluster({ME: 100 * LIMIT, OTHER: LIMIT})
    sending = send(cluster, some(500), 0)
    await until(lambda: is_waiting(cluster))
    assert cluster.sender.full == {OTHER}
    assert len(cluster.offsets_of(ME)) == 500
    assert cluster.watermarks() == [500, 0]
    cluster.limit(100 * LIMIT)
    await sending
    assert cluster.watermarks() == [500, 500]


async def test_who_comes_while_a_batch_waits_is_sent_all_of_it(send: Send) -> None:
    cluster = Cluster({ME: LIMIT, OTHER: LIMIT})
    sending = send(cluster, [*some(500), ("r600", None)], 0)
    await until(lambda: is_waiting(cluster))
    cluster.newest = state_of(ME, NEW, epoch=2)
    cluster.replicas[NEW] = cluster.replica(NEW, LIMIT)
    cluster.silent.add(OTHER)
    cluster.limit(100 * LIMIT)
    await sending
    assert cluster.offsets_of(NEW) == cluster.offsets_of(ME)
    assert cluster.replicas[NEW].watermarks == {0: 501}
    (heard,), _ = cluster.replicas[NEW].store.heard(["r600"])
    assert heard is not None, "what has been deleted must not come back there"


async def test_a_record_larger_than_the_limit_does_not_stop_the_rest(send: Send) -> None:
    cluster = Cluster({ME: LIMIT, OTHER: LIMIT})
    await send(cluster, [("huge", {"story": "small yet"}), *some(5)], 0)
    huge = {"story": "x" * LIMIT}
    batch = await send(cluster, [*some(20, 5), ("huge", huge), *some(20, 25)], 6)
    ((offset, reason),) = cluster.letters
    assert offset == 26
    assert "too large to be held" in reason
    assert "store.memory-limit is 400,000" in reason
    assert "raise the limit" in reason
    held = cluster.offsets_of(ME)
    assert held == cluster.offsets_of(OTHER)
    assert held == {row_id: offset for row_id, offset in held.items() if row_id != "huge"}, "the log has a newer one"
    assert len(held) == 45
    assert cluster.watermarks() == [47, 47]
    assert not cluster.alarms, "nothing waits"
    for replica in cluster.replicas.values():
        assert not replica.store.statistics()["memory"]["full"]
    figures = Figures()
    figures.account(batch, 0.0)
    told = figures.to_wire()
    assert (told["records"], told["deletes"], told["dead_letters"]) == (40, 0, 1)
    digests = [replica.store.digests()[0] for replica in cluster.replicas.values()]
    assert digests[0] == digests[1]


async def test_copies_agree_though_one_could_hold_the_record(send: Send) -> None:
    cluster = Cluster({ME: 100 * LIMIT, OTHER: LIMIT})
    await send(cluster, [("huge", {"story": "x" * LIMIT})], 0)
    assert [offset for offset, _ in cluster.letters] == [0]
    assert cluster.offsets_of(ME) == cluster.offsets_of(OTHER) == {}
    assert cluster.watermarks() == [1, 1]


async def test_a_limit_that_holds_nothing_is_at_fault_and_no_record(send: Send) -> None:
    cluster = Cluster({ME: 20_000})
    sending = send(cluster, some(3), 0)
    await until(lambda: is_waiting(cluster))
    assert not cluster.letters
    cluster.limit(LIMIT)
    await sending
    assert len(cluster.offsets_of(ME)) == 3


async def test_a_record_is_given_up_only_when_its_letter_is_safe(send: Send) -> None:
    cluster = Cluster({ME: LIMIT})

    async def away(raw: RawBatch, refusals: list[Refusal]) -> None:
        raise HeadraceError("Kafka is away")

    cluster.sender._refuse = away
    with pytest.raises(HeadraceError, match="Kafka is away"):
        await send(cluster, [("huge", {"story": "x" * LIMIT})], 0)
    assert cluster.watermarks() == [0]


async def test_a_scheduler_that_is_lost_while_it_tells_does_not_stop_writes(send: Send) -> None:
    cluster = Cluster({ME: 100 * LIMIT, OTHER: 100 * LIMIT})
    cluster.scheduler_lost = True
    cluster.replicas[OTHER].adopt(state_of(ME, OTHER, epoch=2))
    await send(cluster, some(5), 0)
    assert [replica.state.epoch for replica in cluster.replicas.values()] == [2, 2]
    assert cluster.offsets_of(ME) == cluster.offsets_of(OTHER)
    assert cluster.watermarks() == [5, 5]
    # Who drops rows for one that joined must know that it knows.
    with_new = dataclasses.replace(
        state_of(ME, OTHER, epoch=3), members={ME: "active", OTHER: "active", NEW: "joining"}
    )
    for replica in cluster.replicas.values():
        replica.adopt(with_new)
    cluster.replicas[NEW] = cluster.replica(NEW, LIMIT)
    cluster.replicas[NEW].adopt(with_new)
    cluster.replicas[OTHER].adopt(state_of(ME, OTHER, NEW, epoch=4))
    with pytest.raises(ClusterError, match="the scheduler cannot be reached"):
        await send(cluster, some(5), 5)
    assert cluster.replicas[ME].state.epoch == 3
    # Where nobody was told anything newer, whoever does not answer is waited for, as before.
    cluster.silent.add(OTHER)
    with pytest.raises(ClusterError, match="the scheduler cannot be reached"):
        await send(cluster, some(5), 5)


async def test_who_has_left_the_placement_is_waited_for_no_longer(send: Send) -> None:
    cluster = Cluster({ME: LIMIT, OTHER: LIMIT})
    asked, call = asyncio.Event(), cluster.call

    async def hangs(address: str, op: str, /, **message: Any) -> dict[str, Any]:
        if address == OTHER:
            asked.set()
            await asyncio.Event().wait()
        return await call(address, op, **message)

    cluster.call = hangs  # type: ignore[method-assign]
    sending = send(cluster, some(5), 0)
    await asyncio.wait_for(asked.wait(), 30)
    assert not sending.done()
    cluster.newest = state_of(ME, epoch=2)
    cluster.replicas[ME].adopt(cluster.newest)
    await asyncio.wait_for(cluster.sender.drained(2), 30)
    await asyncio.wait_for(sending, 30)
    assert cluster.replicas[ME].store.view.rows == 5
