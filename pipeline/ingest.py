"""The way in: one worker's Streamz graph from Kafka to every copy.

::

    from_kafka_log -> decode -> encode -> route and apply -> account

A micro-batch keeps what each step adds to it. Nothing here remembers a batch: if a step fails, the source sends the
same raw batch through again, and applying twice changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import Executor
from dataclasses import replace
from typing import Any

from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionState
from headrace.gpu.errors import ClusterError, HeadraceError
from headrace.pipeline.figures import Figures
from headrace.pipeline.ingest_settings import Encode, IngestSettings, Node
from headrace.pipeline.letters import Letters
from headrace.pipeline.micro_batch import MicroBatch
from headrace.pipeline.preparing import Preparer, texts_to_encode
from headrace.pipeline.sending import Sender, no_offsets_of
from headrace.streams.batches import RawBatch, Refusal
from headrace.streams.reader import ReaderSettings
from headrace.streams.source import from_kafka_log
from headrace.streams.topic_identity import Seen

__all__ = ["Ingest", "IngestSettings"]

log = logging.getLogger("headrace.pipeline")


class Ingest:
    """Takes in the topic partitions that one worker is responsible for. All methods belong on the worker's event loop.

    Parameters
    ----------
    node : Node
    replica : Replica
    encode : async callable or None
        Texts to float32 (n, dim).
    executor : Executor
        For decoding large batches.
    settings : IngestSettings
    """

    def __init__(
        self, node: Node, replica: Replica, encode: Encode | None, executor: Executor, settings: IngestSettings
    ) -> None:
        state = replica.state
        source, name = state.source, state.spec.name
        if source is None:
            raise ClusterError(f"collection {name!r} has no topic to read")
        self._node, self._replica, self._settings, self._kafka = node, replica, settings, source
        self._encodes = encode is not None
        self.incarnation = state.incarnation
        reader = settings.reader
        if self._encodes:
            # While one batch is encoded others may be applied, but what arrives meanwhile is encoded together.
            reader = replace(reader, batches_in_flight=settings.texts_in_flight, batches_not_passed=1)
        self.source = from_kafka_log(
            source.bootstrap,
            source.topic,
            f"headrace-{name}",
            partitions=source.partitions,
            settings=reader,
            alarm=lambda text: node.alarm(name, text),
            topic_id=source.topic_id,
            found=self._topic_found,
            refuse=self._refuse,
            retry_delay=settings.retry_delay,
            retry_delay_max=settings.retry_delay_max,
        )
        if self._encodes:
            self.source.reader.max_batch = settings.max_texts
        self._letters = Letters(name, source, settings.reader.kafka)
        self._preparer = Preparer(node, state, source.format, encode, executor, settings.max_record_bytes)
        self._sender = Sender(node, replica, settings, self.source.stable, self._letters.write)
        self.local = self._sender.local
        self._figures = Figures()
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
        self._letters.count()

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
        await self._sender.drained(epoch)

    async def close(self) -> None:
        await self.source.halt()
        await self._letters.close()
        self.graph.destroy()  # Streamz remembers every sink, and with it all that feeds it, until it is told so

    def status(self) -> dict[str, Any]:
        """Counters, how far the dead letters' topic goes, lag, workers that have no room, Kafka's outage if there is
        one, and histograms (as `Histogram.to_wire`); plain msgpack types.
        """
        away = self.source.away
        return {
            **self._figures.to_wire(),
            "foreign": self._sender.foreign,
            "letters": list(self._letters.ends.items()),
            "worker": self._node.address,
            "kafka_away": None if away is None else [away.since, away.broker, away.error],
            "lag": self.source.lag,
            "full": sorted(self._sender.full),
        }

    @property
    def reader_settings(self) -> ReaderSettings:
        """How the topic is read."""
        return self._settings.reader

    async def made_of(self, raw: RawBatch) -> MicroBatch:
        """Records that were read once more, decoded and with vectors, as the graph would make them; for mending."""
        batch = MicroBatch(raw)
        await self._preparer.decode(batch)
        assert batch.decoded is not None
        await self._preparer.to_vectors(batch, texts_to_encode(batch.decoded))
        return batch

    # -- steps ---------------------------------------------------------------------------------------------------------

    async def _decode(self, batch: MicroBatch) -> MicroBatch:
        await self._preparer.decode(batch)
        return batch

    async def _to_vectors(self, batch: MicroBatch) -> MicroBatch:
        assert batch.decoded is not None
        texts, reader = texts_to_encode(batch.decoded), self.source.reader
        if self._encodes:
            reader.max_batch = self._settings.max_texts if texts else reader.settings.max_batch
        await self._preparer.to_vectors(batch, texts)
        reader.passed(batch.raw)
        return batch

    async def _apply(self, batch: MicroBatch) -> MicroBatch:
        assert batch.decoded is not None
        ranges, refused = batch.raw.ranges, batch.decoded.refused
        with batch.timed("apply"):
            if refused:
                # Good neighbours are searchable at once; the offsets count as applied only when the refused are safe.
                await asyncio.gather(
                    self._letters.write(batch.raw, refused), self._sender.everywhere(batch, no_offsets_of(ranges))
                )
            await self._sender.everywhere(batch, ranges)
        batch.applied_at = self._node.clock()
        return batch

    def _account(self, batch: MicroBatch) -> None:
        self._figures.account(batch, self._node.clock())

    # -- what cannot be used, and what is told -------------------------------------------------------------------------

    async def _refuse(self, raw: RawBatch, reason: str) -> None:
        await self._letters.write(raw, [Refusal(0, reason)])
        self._figures.dead_letter()

    def _topic_found(self, seen: Seen) -> None:
        self._node.topic_found(self._replica.state.spec.name, self._kafka.topic_id, seen)
