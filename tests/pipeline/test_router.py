"""What a client's reads wait for, and what not: with a scheduler and workers that are only played."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace.cluster.state import Codebook, CollectionSpec, CollectionState, Source, first_codebook
from headrace.gpu.errors import BrokerError, ClusterError, CollectionNotFound, ConsistencyTimeout, StaleEpoch
from headrace.pipeline import copies as copies_module
from headrace.pipeline import known_state, waiting
from headrace.pipeline.node import HeadraceWorker
from headrace.pipeline.reads import Router
from headrace.streams.topic_identity import Seen

A, B = "tcp://10.0.0.1:4000", "tcp://10.0.0.2:4000"
FOREVER = 60.0


class Cluster:
    """Two workers that hold everything; `hangs` never answer, and the scheduler may take its time."""

    def __init__(self) -> None:
        self.state = self.of(A, B)
        self.hangs: set[str] = set()
        self.asked: list[tuple[str, str]] = []
        self.dropped = False
        self.goes_by = self.oldest = 3

    @staticmethod
    def of(*workers: str, epoch: int = 3) -> CollectionState:
        return CollectionState(
            CollectionSpec("docs", 2),
            first_codebook(2),
            epoch=epoch,
            members=dict.fromkeys(workers, "active"),
            copies={0: workers},
            serving={0: workers},
        )

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        self.asked.append((address, op))
        if address in self.hangs:
            await asyncio.sleep(min(deadline, FOREVER))
            raise ClusterError(f"{address} did not answer {op!r}")
        if op != "describe":
            if message.get("epoch", self.oldest) < self.oldest:
                raise StaleEpoch(f"{address} is at epoch {self.oldest}")
            return {"from": address, "epoch": self.goes_by}
        if self.dropped:
            raise CollectionNotFound("there is no collection 'docs'")
        wire = None if message["epoch"] == self.state.epoch else self.state.to_wire()
        return {"state": wire, "schema": {}, "alarms": []}

    def router(self) -> Router:
        return Router("docs", self.call, "scheduler")


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the state that a router knows grow old without waiting."""
    ahead = 0.0
    real = time.monotonic

    def go(seconds: float) -> None:
        nonlocal ahead
        ahead += seconds

    monkeypatch.setattr(known_state.time, "monotonic", lambda: real() + ahead)
    return go


async def test_a_read_does_not_wait_for_the_scheduler(later: Callable[[float], None]) -> None:
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.hangs.add("scheduler")
    later(5.0)
    answers = await asyncio.wait_for(asyncio.gather(*(router.ask_cover("get", 5.0, {}) for _ in range(3))), 0.5)
    assert {answer["from"] for (answer,) in answers} == {A, B}
    await asyncio.sleep(0)
    assert cluster.asked.count(("scheduler", "describe")) == 2, "one look for all of them"
    router.close()


async def test_what_has_changed_is_known_to_the_next_read(later: Callable[[float], None]) -> None:
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.state = cluster.of(B, epoch=4)
    later(5.0)
    await router.ask_cover("get", 5.0, {})
    await asyncio.sleep(0.01)
    assert (await router.known()).active == (B,)


async def test_a_collection_that_was_dropped_is_said_to_be(later: Callable[[float], None]) -> None:
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.dropped = True
    later(5.0)
    await router.known()
    await asyncio.sleep(0.01)
    with pytest.raises(CollectionNotFound, match="there is no collection"):
        await router.known()


async def test_who_waits_for_all_copies_does_not_wait_for_one_that_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_state, "STATE_AGE", 0.02)
    cluster = Cluster()
    router = cluster.router()
    cluster.hangs.add(A)
    everywhere = asyncio.ensure_future(router.wait_everywhere({0: 5}, FOREVER))
    await asyncio.sleep(0.1)
    assert not everywhere.done(), "it is a copy that is read"
    cluster.state = cluster.of(B, epoch=4)
    await asyncio.wait_for(everywhere, 2.0)


async def test_who_waits_for_all_copies_waits_for_one_where_there_is_none() -> None:
    """All workers hang and have left the placement: what was written cannot be searched."""
    cluster = Cluster()
    cluster.state = cluster.of()
    router = cluster.router()
    with pytest.raises(ConsistencyTimeout, match="no copy that can be read"):
        await router.wait_everywhere({0: 5}, 0.05)
    everywhere = asyncio.ensure_future(router.wait_everywhere({0: 5}, FOREVER))
    await asyncio.sleep(0.05)
    assert not everywhere.done()
    cluster.state = cluster.of(B, epoch=4)
    await asyncio.wait_for(everywhere, 20.0)
    assert (B, "wait") in cluster.asked


async def test_who_waits_for_all_copies_is_not_content_when_the_last_one_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(known_state, "STATE_AGE", 0.02)
    cluster = Cluster()
    router = cluster.router()
    cluster.hangs |= {A, B}
    everywhere = asyncio.ensure_future(router.wait_everywhere({0: 5}, 1.0))
    await asyncio.sleep(0.05)
    cluster.state = cluster.of(epoch=4)
    with pytest.raises(ConsistencyTimeout, match="no copy that can be read"):
        await everywhere


@pytest.mark.parametrize("required", [{}, {0: 5}], ids=["none", "some"])
async def test_a_deadline_that_passes_is_said_to_have_passed(required: dict[int, int]) -> None:
    cluster = Cluster()
    cluster.hangs |= {A, B}
    router = cluster.router()
    with pytest.raises(ConsistencyTimeout, match=r"a copy that answered 'get' within 0\.\d+ s: .* did not answer"):
        await router.ask_cover("get", 0.1, required)
    with pytest.raises(ConsistencyTimeout, match="no worker answered 'encode' within"):
        await router.ask_any("encode", 0.1)
    with pytest.raises(ConsistencyTimeout, match="had applied what was asked for within"):
        await router.wait_everywhere(required, 0.1)


async def test_kafka_is_named_where_it_is_kafka_that_hangs() -> None:
    """The worker gives up on it before the reader gives up on the worker."""

    class Ends:
        async def known(self, max_age: float) -> dict[int, int]:
            await asyncio.sleep(FOREVER)
            return {}

    source = Source("broker:9092", "docs", 1, "json", {})
    worker: Any = SimpleNamespace(
        replica=lambda name: SimpleNamespace(state=SimpleNamespace(source=source)), _ends={"docs": (source, Ends())}
    )
    cluster = Cluster()

    async def call(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if op != "offsets":
            return await cluster.call(address, op, deadline=deadline, **message)
        assert message["deadline_s"] < deadline
        async with asyncio.timeout(20.0):
            return await HeadraceWorker.on_offsets(worker, **message)

    with pytest.raises(ConsistencyTimeout, match=r"Kafka \(broker:9092\) did not say within 0\.4 s") as caught:
        await Router("docs", call, "scheduler").required("strong", {}, 0.5)
    assert isinstance(caught.value.__cause__, BrokerError)


class Asked(HeadraceWorker):
    """A worker that only knows a state, and is told by Kafka which topic there is."""

    def __init__(self, source: Source, seen: Seen) -> None:
        class Ends:
            def __init__(self) -> None:
                self.seen = seen

            async def known(self, max_age: float) -> dict[int, int]:
                return {0: 7}

        state = replace(Cluster.of(A, epoch=9), source=source, incarnation=1)
        self.replicas = {"docs": SimpleNamespace(state=state)}  # type: ignore[dict-item]
        self.address, self._ends = A, {"docs": (source, Ends())}  # type: ignore[dict-item]
        self.found: list[tuple[str, str, Seen]] = []

    def topic_found(self, collection: str, known: str, seen: Seen) -> None:
        self.found.append((collection, known, seen))


ONE = Source("broker:9092", "docs", 1, "json", {}, topic_id="one")


async def test_ends_of_a_topic_that_was_made_anew_are_refused_and_told_at_once() -> None:
    worker = Asked(ONE, Seen("two", 3))
    with pytest.raises(StaleEpoch, match="was made anew"):
        await worker.on_offsets("docs", 0.0)
    assert worker.found == [("docs", "one", Seen("two", 3))]
    for seen in (Seen("one", 1), Seen("", 1)):  # the embedded broker tells none
        worker = Asked(ONE, seen)
        assert await worker.on_offsets("docs", 0.0) == {"offsets": [[0, 7]], "epoch": 9}
        assert worker.found == []


async def test_a_strong_read_goes_by_a_state_as_new_as_the_ends_that_it_requires() -> None:
    """Else a copy that still holds the old topic would compare them with what it has applied of that."""
    cluster = Cluster()
    worker, told = Asked(ONE, Seen("one", 1)), []

    async def call(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if op == "offsets":
            return await worker.on_offsets(**message)
        if op == "get":
            told.append((message["epoch"], message["incarnation"], message["required"]))
        return await cluster.call(address, op, deadline=deadline, **message)

    router = Router("docs", call, "scheduler")
    assert (await router.state()).epoch == 3
    cluster.state = worker.replicas["docs"].state
    required = await router.required("strong", {}, 5.0)
    await router.ask_cover("get", 5.0, required)
    assert told == [(9, 1, [[0, 7]])]
    # What the client wrote into the topic that was there before is waited for no more; what it wrote into this one is.
    cluster.state = replace(worker.replicas["docs"].state, source=replace(ONE, topic_id="none"), epoch=10)
    await router.state(newest=True)
    cluster.state = replace(worker.replicas["docs"].state, epoch=11)
    worker.replicas["docs"].state = cluster.state
    assert await router.required("strong", {0: 70}, 5.0) == {0: 7}
    assert await router.required("strong", {0: 70}, 5.0) == {0: 70}


async def test_a_newer_state_that_a_worker_goes_by_is_looked_at_once() -> None:
    """Whoever is left when a worker dies answers readers that have not heard of it; they must not look for it long."""
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.state = cluster.of(B, epoch=4)
    cluster.goes_by = 4
    await asyncio.gather(*(router.ask_cover("get", 5.0, {}) for _ in range(9)))
    await asyncio.sleep(0.01)
    assert (await router.known()).active == (B,)
    await router.ask_cover("get", 5.0, {})
    await asyncio.sleep(0.01)
    assert cluster.asked.count(("scheduler", "describe")) == 2, "one look for all of them, and none when it is known"
    router.close()


async def test_reads_that_are_refused_together_ask_for_the_newer_state_once() -> None:
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.state = cluster.of(B, epoch=4)
    cluster.oldest = 4
    await asyncio.gather(*(router.ask_cover("get", 5.0, {}) for _ in range(50)))
    assert cluster.asked.count(("scheduler", "describe")) == 2


async def test_a_scheduler_that_knows_less_than_the_workers_is_not_asked_without_a_pause() -> None:
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.oldest = 4
    with pytest.raises(ConsistencyTimeout, match="at epoch 4"):
        await router.ask_cover("get", 0.2, {})
    assert cluster.asked.count(("scheduler", "describe")) < 30


async def test_a_worker_that_is_slow_is_asked_before_one_that_is_gone() -> None:
    """Just before a worker dies the other was often slow once; both would be avoided, and so neither."""
    cluster = Cluster()
    router = cluster.router()
    await router.ask_cover("get", 5.0, {})
    copies = router._copies

    async def call(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if address == A:
            raise ClusterError(f"{A} cannot be reached")
        return await cluster.call(address, op, deadline=deadline, **message)

    copies._call = call
    copies._avoid = {B: time.monotonic() + FOREVER}
    with pytest.raises(ClusterError, match="cannot be reached"):
        await copies.ask(A, op="get", until=time.monotonic() + 5.0)
    copies._avoid[A] = time.monotonic() + FOREVER
    assert [copies.fewest(cluster.state) for _ in range(4)] == [[B]] * 4
    assert [copies.in_turn(cluster.state) for _ in range(4)] == [[B]] * 4
    assert copies.fewest(cluster.of(A)) == [A], "better than nobody"
    assert copies.in_turn(cluster.of(A)) == [A]
    copies._call = cluster.call
    await copies.ask(A, op="get", until=time.monotonic() + 5.0)
    assert {copies.fewest(cluster.state)[0] for _ in range(4)} == {A, B}, "it has answered since"


async def test_a_worker_that_has_been_silent_since_it_was_asked_comes_last_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copies_module, "_SILENT", 0.0)
    cluster = Cluster()
    cluster.hangs.add(A)
    copies = cluster.router()._copies
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(copies.ask(A, op="get", until=time.monotonic() + FOREVER), 0.01)
    await copies.ask(B, op="get", until=time.monotonic() + FOREVER)
    copies._avoid = {A: time.monotonic() + FOREVER, B: time.monotonic() + FOREVER}
    assert [copies.fewest(cluster.state) for _ in range(4)] == [[B]] * 4


async def test_who_waits_for_all_copies_soon_hears_that_one_is_lost() -> None:
    """Long before a state is looked at anyway, or connecting to where nobody is fails."""
    assert waiting._SOON < known_state.STATE_AGE / 5
    cluster = Cluster()
    router = cluster.router()
    await router.state()
    cluster.hangs.add(A)
    everywhere = asyncio.ensure_future(router.wait_everywhere({0: 5}, FOREVER))
    cluster.state = cluster.of(B, epoch=4)
    router._known._state_at = time.monotonic() + FOREVER  # it is new enough for ever
    await asyncio.wait_for(everywhere, 20.0)


async def test_all_that_wait_for_a_worker_that_hangs_go_on_with_another() -> None:
    """However many they are, and whatever the other one was like a moment ago."""
    cluster = Cluster()
    router = cluster.router()
    await router.ask_cover("get", 5.0, {})
    router._copies._avoid = {A: time.monotonic() + FOREVER, B: time.monotonic() + FOREVER}
    cluster.hangs.add(A)
    reads = asyncio.gather(*(router.ask_cover("get", 5.0, {}) for _ in range(100)))
    answers = await asyncio.wait_for(reads, 2.0)
    assert {answer["from"] for (answer,) in answers} == {B}


async def test_copies_that_are_busy_are_not_asked_twice_by_everybody() -> None:
    """All are slow and all answer: twice the questions would only make it worse."""
    # A machine that stands still for longer than a copy may be silent makes all copies seem to hang: not always.
    for _ in range(8):
        if await asked_while_busy() < 250:
            return
    raise AssertionError("more than one request in ten was asked twice, each time")


async def asked_while_busy() -> int:
    """How often copies were asked for 200 answers, which they give one by one."""
    cluster = Cluster()
    router = cluster.router()
    await router.ask_cover("get", 5.0, {})
    line = asyncio.Lock()

    async def busy(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        cluster.asked.append((address, op))
        async with line:
            await asyncio.sleep(0.002)
        return {"from": address}

    router._copies._call = busy
    cluster.asked.clear()
    await asyncio.gather(*(router.ask_cover("get", 30.0, {}) for _ in range(200)))
    return len(cluster.asked)


async def test_a_worker_that_was_given_up_and_has_heard_of_nothing_is_not_read_beside_one_that_has() -> None:
    def state(epoch: int, *workers: str) -> CollectionState:
        serving = {cell: (worker,) for cell, worker in enumerate(workers, 1)}
        book = Codebook(1, 1, np.zeros((2, 2), np.float32))
        return replace(Cluster.of(*workers, epoch=epoch), codebook=book, copies=serving, serving=serving)

    third = "tcp://10.0.0.3:4000"
    one, two = state(1, A, B), state(2, A, third)
    newest = one

    async def call(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if op == "describe":
            return {"state": None if message["epoch"] == newest.epoch else newest.to_wire(), **newest.told()}
        return {"from": address, "epoch": 1 if address == B else newest.epoch, "applied": [[0, 9]], "moved": []}

    router = Router("docs", call, "scheduler")
    assert {answer["from"] for answer in await router.ask_cover("search", 5.0, {})} == {A, B}
    newest = two
    assert {answer["from"] for answer in await router.ask_cover("search", 5.0, {}, waits=False)} == {A, third}
    router.close()
