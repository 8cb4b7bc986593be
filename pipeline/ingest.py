"""The way in: one worker's Streamz graph from Kafka to every copy.

::

    from_kafka_log -> decode -> encode -> route -> apply -> account

A micro-batch keeps what each step adds to it. Nothing here remembers a batch: if a step fails, the source sends the
same raw batch through again, and applying twice changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from headrace.cluster.fanout import Header, fan_out, part_for
from headrace.cluster.replica import Replica
from headrace.cluster.routing import Router
from headrace.cluster.state import CollectionState
from headrace.gpu.backend import Backend
from headrace.gpu.errors import (
    BrokerError,
    ClusterError,
    CollectionNotFound,
    EncoderError,
    HeadraceError,
    StaleEpoch,
    StoreFull,
    TopicError,
)
from headrace.gpu.rows import DELETED
from headrace.pipeline.clocks import Early
from headrace.pipeline.metrics import Histogram
from headrace.streams.batches import Decoded, RawBatch, RecordSpec, Refusal, keep_last
from headrace.streams.dead_letters import SUFFIX, DeadLetters
from headrace.streams.reader import ReaderSettings
from headrace.streams.records import decode
from headrace.streams.source import from_kafka_log
from headrace.streams.topic_identity import Seen
from headrace.streams.topics import Offsets

__all__ = ["Ingest", "IngestSettings", "MicroBatch", "route"]

log = logging.getLogger("headrace.pipeline")

Encode = Callable[[list[str]], Awaitable[npt.NDArray[np.float32]]]

_FLOAT16_MAX = float(np.finfo(np.float16).max)

_LOOK_AGAIN = 5.0
_PATIENCE = 2.0
"""Seconds between two looks at how many dead letters there are while Kafka does not say, and for one of them."""

STAGES = ("kafka", "decode", "encode", "apply", "acknowledge")


@dataclass(frozen=True, slots=True)
class IngestSettings:
    """How records are taken in; times in seconds. See ``headrace.yaml`` for what each is for."""

    reader: ReaderSettings = field(default_factory=ReaderSettings)
    max_texts: int = 16
    texts_in_flight: int = 2
    max_record_bytes: int = 1 << 20
    apply_deadline: float = 2.0
    retry_delay: float = 0.05
    retry_delay_max: float = 1.0


@dataclass(slots=True)
class MicroBatch:
    """A raw batch on its way, with what the steps have made of it and how long each took (seconds)."""

    raw: RawBatch
    decoded: Decoded | None = None
    vectors: npt.NDArray[np.float32] | None = None
    took: dict[str, float] = field(default_factory=dict)
    applied_at: float = 0.0

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.took[stage] = self.took.get(stage, 0.0) + time.perf_counter() - start


def route(raw: RawBatch, decoded: Decoded, vectors: npt.NDArray[np.float32], router: Router) -> Header:
    """Give each record its cell: the router's, `DELETED` for a delete.

    Parameters
    ----------
    vectors : float32 (v, dim)
        Of the records that are no deletes, in order; normalised where the metric is cosine.
    """
    keeps = ~decoded.deleted
    cells = np.full(len(decoded.ids), DELETED, dtype=np.int32)
    if len(vectors):
        cells[keeps] = router.cells(vectors)
    return Header(
        ids=decoded.ids,
        topic_partitions=raw.topic_partitions[decoded.rows],
        offsets=raw.offsets[decoded.rows],
        timestamps=raw.timestamps[decoded.rows],
        cells=cells,
        vectors=vectors,
        vector_at=np.cumsum(keeps) - 1,
        attributes=decoded.attributes,
    )


class Node(Protocol):
    """What the graph needs of its worker."""

    address: str
    backend: Backend

    def clock(self) -> float: ...
    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]: ...
    async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]: ...
    def maintain(self, replica: Replica) -> None: ...
    def adopt_soon(self, state: CollectionState) -> None: ...
    def alarm(self, collection: str, text: str) -> None: ...
    def topic_found(self, collection: str, known: str, seen: Seen) -> None: ...


class Ingest:
    """Takes in the topic partitions that one worker is responsible for. All methods belong on the worker's event loop.

    Parameters
    ----------
    node : Node
    replica : Replica
    encode : async callable or None
        Texts to float32 (n, dim).
    executor : Executor
        For decoding large batches and for blocking Kafka calls.
    settings : IngestSettings
    """

    def __init__(
        self, node: Node, replica: Replica, encode: Encode | None, executor: Executor, settings: IngestSettings
    ) -> None:
        source = replica.state.source
        if source is None:
            raise ClusterError(f"collection {replica.state.spec.name!r} has no topic to read")
        self._node, self._replica, self._encode, self._executor = node, replica, encode, executor
        self._settings, self._kafka = settings, source
        self.incarnation = replica.state.incarnation
        self._schema: Mapping[str, str] = dict(replica.state.schema)
        self._router = Router(replica.state.codebook, node.backend)
        self._sending: dict[int, int] = {}
        self._sent = asyncio.Condition()
        self._full: dict[str, str] = {}
        self._dead_letters: DeadLetters | None = None
        self._letters: dict[int, int] = {}  # the ends of their topic
        self._counting: asyncio.Task[None] | None = None
        self.counts = dict.fromkeys(("records", "deletes", "dead_letters", "batches", "foreign"), 0)
        self.freshness = Histogram()
        self._early = Early()
        self.stages = {stage: Histogram() for stage in STAGES}
        self._rate = _Rate()
        name = replica.state.spec.name
        reader = settings.reader
        if encode is not None:
            # While one batch is encoded others may be applied, but what arrives meanwhile is encoded together.
            reader = replace(reader, batches_in_flight=settings.texts_in_flight, batches_not_passed=1)
        self.source = from_kafka_log(
            source.bootstrap,
            source.topic,
            f"headrace-{name}",
            partitions=source.partitions,
            settings=reader,
            alarm=self._alarm,
            topic_id=source.topic_id,
            found=self._topic_found,
            refuse=self._refuse,
            retry_delay=settings.retry_delay,
            retry_delay_max=settings.retry_delay_max,
        )
        if encode is not None:
            self.source.reader.max_batch = settings.max_texts
        self.graph = (
            self.source.map(MicroBatch)
            .stage(self._decode, parallelism=1)
            .stage(self._to_vectors, parallelism=1)
            .stage(self._apply, parallelism=reader.batches_in_flight)
            .sink(self._account)
        )

    # -- life ----------------------------------------------------------------------------------------------------------

    async def follow(self, state: CollectionState) -> None:
        """Read what the state assigns to this worker, from the lowest offset that some copy lacks."""
        if state.source is not None:
            self._kafka = state.source
            self.source.expect(state.source.topic_id)
        mine = {tp for tp, reader in state.readers.items() if reader == self._node.address}
        fresh = mine - self.source.assigned
        starts = await self._starts(state) if fresh else {}
        self.source.assign({tp: self.source.stable.get(tp, starts.get(tp, 0)) for tp in sorted(mine)})
        if fresh:
            log.info("collection %r: reading topic partitions %s", state.spec.name, sorted(mine))
        self.source.start()
        if self._counting is None:
            self._counting = asyncio.get_running_loop().create_task(self._count_letters())

    async def _count_letters(self) -> None:
        """Find the dead letters that are there already: of what a worker counted nothing is left when it ends."""

        def look() -> dict[int, int]:
            kafka, topic = dict(self._settings.reader.kafka), self._kafka.topic + SUFFIX
            return Offsets(self._kafka.bootstrap, topic, settings=kafka, deadline=_PATIENCE).latest(_PATIENCE)

        while True:
            try:
                self._letters_end(await asyncio.to_thread(look))
            except TopicError:
                return  # there are none
            except BrokerError as error:
                log.info("collection %r: its dead letters are counted later: %s", self._replica.state.spec.name, error)
                await asyncio.sleep(_LOOK_AGAIN)
            else:
                return

    def _letters_end(self, ends: Mapping[int, int]) -> None:
        for tp, end in ends.items():
            self._letters[tp] = max(self._letters.get(tp, 0), end)

    async def _starts(self, state: CollectionState) -> dict[int, int]:
        low = dict(self._replica.watermarks)
        if state.members.get(self._node.address) != "active":
            low = {}
        for peer in state.active:
            if peer == self._node.address:
                continue
            marks = await self._watermarks_of(peer, state)
            low = {tp: min(low.get(tp, mark), mark) for tp, mark in marks.items()}
        return {tp: max(low.get(tp, 0), self._kafka.origins.get(tp, 0)) for tp in range(self._kafka.partitions)}

    async def _watermarks_of(self, peer: str, state: CollectionState) -> dict[int, int]:
        """How far a peer is; nothing for one that does not answer, which leaves the placement and begins anew."""
        name, deadline = state.spec.name, self._settings.apply_deadline
        until = time.monotonic() + deadline
        while True:
            try:
                answer = await self._node.call(peer, "watermarks", deadline=deadline, collection=name)
            except HeadraceError as error:
                if time.monotonic() < until:  # it may hear of the collection a moment after us
                    await asyncio.sleep(0.02)
                    continue
                await self._node.call_scheduler(
                    "suspect", collection=name, worker=peer, epoch=state.epoch, why=str(error)
                )
                return {}
            return dict(answer["watermarks"])

    async def drained(self, epoch: int) -> None:
        """Return when nothing that was sent under an older epoch is under way."""
        async with self._sent:
            await self._sent.wait_for(lambda: not any(count for old, count in self._sending.items() if old < epoch))

    async def close(self) -> None:
        if self._counting is not None:
            self._counting.cancel()
        await self.source.halt()
        if self._dead_letters is not None:
            await asyncio.to_thread(self._dead_letters.close)

    def status(self) -> dict[str, Any]:
        """Counters, how far the dead letters' topic goes, lag, workers that have no room, Kafka's outage if there is
        one, and histograms (as `Histogram.to_wire`); plain msgpack types.
        """
        away = self.source.away
        return {
            **self.counts,
            "letters": list(self._letters.items()),
            "worker": self._node.address,
            "kafka_away": None if away is None else [away.since, away.broker, away.error],
            "early": self._early.count,
            "skew_ms": self._early.skew,
            "lag": self.source.lag,
            "rate": self._rate.now(),
            "full": sorted(self._full),
            "freshness": self.freshness.to_wire(),
            "stages": {stage: histogram.to_wire() for stage, histogram in self.stages.items()},
        }

    @property
    def reader_settings(self) -> ReaderSettings:
        """How the topic is read."""
        return self._settings.reader

    async def made_of(self, raw: RawBatch) -> MicroBatch:
        """Records that were read once more, decoded and with vectors, as the graph would make them; for mending."""
        return await self._to_vectors(await self._decode(MicroBatch(raw)))

    # -- steps ---------------------------------------------------------------------------------------------------------

    async def _decode(self, batch: MicroBatch) -> MicroBatch:
        raw = batch.raw
        batch.took["kafka"] = max(0.0, raw.pulled - float(raw.timestamps.min()) / 1e3) if len(raw.keys) else 0.0
        with batch.timed("decode"):
            decoded = await self._decoded(raw)
            unknown = {name: kind for name, kind in decoded.schema.items() if name not in self._schema}
            if unknown:
                answer = await self._node.call_scheduler(
                    "learn", collection=self._replica.state.spec.name, schema=unknown
                )
                self._schema = dict(answer["schema"])
                if any(self._schema[name] != kind for name, kind in unknown.items()):
                    decoded = await self._decoded(raw)  # another worker met the column first, with another kind
            batch.decoded = keep_last(decoded, raw.topic_partitions, raw.offsets, raw.timestamps)
        return batch

    async def _decoded(self, raw: RawBatch) -> Decoded:
        spec = self._replica.state.spec
        wanted = RecordSpec(
            dim=spec.dim,
            metric=spec.metric,
            ids=spec.ids,
            format=self._kafka.format,
            schema=self._schema,
            encoder=spec.encoder,
            max_record_bytes=self._settings.max_record_bytes,
            largest=_FLOAT16_MAX if spec.index.dtype == "float16" else float("inf"),
        )
        if len(raw.keys) <= 64:  # well under a millisecond: not worth a thread
            return decode(raw, wanted, self._node.backend.frames)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, decode, raw, wanted, self._node.backend.frames)

    async def _to_vectors(self, batch: MicroBatch) -> MicroBatch:
        decoded = batch.decoded
        assert decoded is not None
        spec = self._replica.state.spec
        with batch.timed("encode"):
            keeps = np.flatnonzero(~decoded.deleted)
            vectors = np.empty((len(decoded.ids), spec.dim), dtype=np.float32)
            given = decoded.vectors
            if spec.metric == "cosine" and len(given):
                given = given / np.linalg.norm(given, axis=1, keepdims=True)
            vectors[decoded.vector_rows] = given
            has_vector = np.zeros(len(decoded.ids), dtype=np.bool_)
            has_vector[decoded.vector_rows] = True
            texts = [row for row in keeps.tolist() if not has_vector[row]]
            if self._encode is not None:
                reader = self.source.reader
                reader.max_batch = self._settings.max_texts if texts else reader.settings.max_batch
            if texts:
                if self._encode is None:
                    raise EncoderError(f"collection {spec.name!r} has no encoder for its texts")
                encoded = await self._encode([decoded.texts[row] or "" for row in texts])
                if encoded.shape != (len(texts), spec.dim) or not np.isfinite(encoded).all():
                    raise EncoderError(
                        f"encoder {spec.encoder} answered {encoded.shape} for {len(texts)} texts, or numbers that are "
                        f"not finite; ({len(texts)}, {spec.dim}) finite ones were expected"
                    )
                vectors[texts] = encoded
            batch.vectors = vectors[keeps]
        self.source.reader.passed(batch.raw)
        return batch

    async def _apply(self, batch: MicroBatch) -> MicroBatch:
        assert batch.decoded is not None
        with batch.timed("apply"):
            if batch.decoded.refused:
                # Good neighbours are searchable at once; the offsets count as applied only when the refused are safe.
                await asyncio.gather(self._write_dead_letters(batch), self._everywhere(batch, {}))
                await self._everywhere(batch, batch.raw.ranges)
            else:
                await self._everywhere(batch, batch.raw.ranges)
        batch.applied_at = self._node.clock()
        return batch

    async def _everywhere(self, batch: MicroBatch, ranges: Mapping[int, tuple[int, int]]) -> None:
        """Apply to all workers of the newest state; whoever does not answer leaves the placement, and it is done
        again. A worker that is full stays: it is done again until there is room, and meanwhile the lag grows in Kafka.
        """
        assert batch.decoded is not None
        assert batch.vectors is not None
        pause = self._settings.retry_delay
        while True:
            state = self._replica.state
            if state.incarnation != self.incarnation:
                # These records may be of a topic that is no more: they have no place among the new one's.
                raise CollectionNotFound(f"collection {state.spec.name!r} has begun anew")
            self._sending[state.epoch] = self._sending.get(state.epoch, 0) + 1
            failed: dict[str, str] = {}
            full: dict[str, StoreFull] = {}
            try:
                if self._router.codebook is not state.codebook:
                    self._router = Router(state.codebook, self._node.backend)
                header = route(batch.raw, batch.decoded, batch.vectors, self._router)
                outcome = await fan_out(
                    self._node.call,
                    state,
                    {worker: part_for(header, worker, state) for worker in state.members},
                    me=self._node.address,
                    local=self.local,
                    deadline=self._settings.apply_deadline,
                    ranges=ranges,
                    stable=self.source.stable,
                )
                failed = {worker: str(answer) for worker, answer in outcome.items() if isinstance(answer, ClusterError)}
                full = {worker: answer for worker, answer in outcome.items() if isinstance(answer, StoreFull)}
                if not failed and not full:
                    self._full = {}
                    return
            except StaleEpoch:
                pass  # a newer state is on its way; it is fetched below
            finally:
                self._sending[state.epoch] -= 1
                if not self._sending[state.epoch]:
                    del self._sending[state.epoch]
                async with self._sent:
                    self._sent.notify_all()
            if full and not failed:
                self._no_room(full)
                await asyncio.sleep(pause)
                pause = min(2 * pause, self._settings.retry_delay_max)
            else:
                await self._newer_state(state, failed)

    def _no_room(self, full: Mapping[str, StoreFull]) -> None:
        name = self._replica.state.spec.name
        for worker in full.keys() - self._full.keys():
            log.warning("collection %r: %s: %s; records wait in Kafka", name, worker, full[worker])
            self._alarm(
                f"{worker} reached its store.memory-limit and took no more rows: records waited in Kafka, deletes "
                "behind them too; add a worker or raise the limit"
            )
        self._full = {worker: str(error) for worker, error in full.items()}

    async def _newer_state(self, state: CollectionState, failed: Mapping[str, str]) -> None:
        name = state.spec.name
        for worker, why in failed.items():
            log.warning("collection %r: %s", name, why)
            await self._node.call_scheduler("suspect", collection=name, worker=worker, epoch=state.epoch, why=why)
        answer = await self._node.call_scheduler("await_state", collection=name, epoch=state.epoch, patience=1.0)
        newer = CollectionState.from_wire(answer["state"])
        if newer.epoch > self._replica.state.epoch:
            # In a task of its own: adopting waits for batches to finish that may include this one.
            self._node.adopt_soon(newer)
        await asyncio.sleep(0.005)

    def local(self, *args: Any) -> Any:
        """`Replica.apply` of this worker."""
        try:
            applied = self._replica.apply(*args)
        finally:  # also where there was no room: tidying up makes some
            self._node.maintain(self._replica)
        if applied is not None:
            self.counts["foreign"] += applied.foreign
        return applied

    def _account(self, batch: MicroBatch) -> None:
        assert batch.decoded is not None
        now = self._node.clock()
        usable = len(batch.decoded.ids)
        if usable:
            stamps = batch.raw.timestamps[batch.decoded.rows].astype(np.float64)
            self.freshness.add_many(self._early.sift(batch.applied_at * 1e3 - stamps))
            batch.took["acknowledge"] = now - batch.applied_at
            for stage in STAGES:
                self.stages[stage].add(batch.took.get(stage, 0.0) * 1e3)
        deletes = int(batch.decoded.deleted.sum())
        self.counts["records"] += usable - deletes
        self.counts["deletes"] += deletes
        self.counts["dead_letters"] += len(batch.decoded.refused)
        self.counts["batches"] += 1
        self._rate.add(usable)

    # -- what cannot be used, and what is told -------------------------------------------------------------------------

    async def _write_dead_letters(self, batch: MicroBatch) -> None:
        assert batch.decoded is not None
        await self._to_dead_letters(batch.raw, batch.decoded.refused)

    async def _refuse(self, raw: RawBatch, reason: str) -> None:
        await self._to_dead_letters(raw, [Refusal(0, reason)])
        self.counts["dead_letters"] += 1

    async def _to_dead_letters(self, raw: RawBatch, refusals: list[Refusal]) -> None:
        def write() -> Mapping[int, int]:
            if self._dead_letters is None:
                kafka = dict(self._settings.reader.kafka)
                self._dead_letters = DeadLetters(self._kafka.bootstrap, self._kafka.topic, settings=kafka)
            return self._dead_letters.write(raw, refusals).offsets

        first = refusals[0]
        log.warning(
            "collection %r: %d records to the dead letters; the first, topic partition %d offset %d: %s",
            self._replica.state.spec.name,
            len(refusals),
            raw.topic_partitions[first.row],
            raw.offsets[first.row],
            first.reason,
        )
        self._letters_end(await asyncio.to_thread(write))

    def _topic_found(self, seen: Seen) -> None:
        self._node.topic_found(self._replica.state.spec.name, self._kafka.topic_id, seen)

    def _alarm(self, text: str) -> None:
        self._node.alarm(self._replica.state.spec.name, text)


class _Rate:
    """Records a second over the last five seconds."""

    def __init__(self) -> None:
        self._seconds: dict[int, int] = {}

    def add(self, records: int) -> None:
        now = int(time.monotonic())
        self._seconds[now] = self._seconds.get(now, 0) + records
        for old in [second for second in self._seconds if second < now - 6]:
            del self._seconds[old]

    def now(self) -> float:
        now = int(time.monotonic())
        return sum(count for second, count in self._seconds.items() if now - 5 <= second < now) / 5
