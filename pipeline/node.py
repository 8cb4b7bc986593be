"""A worker of the whole product: `cluster.worker` with the ingest graph and the encoders."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.cluster.coordinator import CoordinatorSettings
from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionState, Source
from headrace.cluster.wire import floats_to_wire, offsets_to_wire
from headrace.cluster.worker import WorkerNode
from headrace.gpu.errors import BrokerError, ClusterError, EncoderError, HeadraceError, StaleEpoch
from headrace.gpu.gather import GatherSettings
from headrace.gpu.store import StoreSettings
from headrace.pipeline import config
from headrace.pipeline.encoders import load_encoder
from headrace.pipeline.ends import Ends
from headrace.pipeline.ingest import Ingest
from headrace.pipeline.ingest_settings import Encode, IngestSettings
from headrace.pipeline.mending import Mender
from headrace.streams.topic_identity import Seen, another
from headrace.streams.topics import Offsets

__all__ = ["HeadraceWorker"]

log = logging.getLogger("headrace.pipeline")


class HeadraceWorker(WorkerNode):
    """The plugin that `launch` registers on every worker."""

    calls = (*WorkerNode.calls, "encode", "offsets", "ingest_status", "mend")

    def __init__(
        self,
        backend: str = "auto",
        store: StoreSettings | None = None,
        ingest: IngestSettings | None = None,
        encoder_threads: int | None = None,
        gather: GatherSettings | None = None,
        move_rate: float = 20_000.0,
        coordinator: CoordinatorSettings | None = None,
        patience: float = 3600.0,
    ) -> None:
        self._ingest_settings = ingest or IngestSettings()
        deadline = self._ingest_settings.apply_deadline
        super().__init__(
            backend,
            store,
            apply_deadline=deadline,
            gather=gather,
            move_rate=move_rate,
            coordinator=coordinator,
            patience=patience,
        )
        self._encoder_threads = encoder_threads

    def clock(self) -> float:
        """Seconds since the epoch: what freshness is measured with, and nothing else is."""
        return time.time()

    async def setup(self, worker: Any) -> None:
        self._seed = self.seeded()  # before it holds what cannot travel, and what is this worker's alone
        self.role = config.get("worker.role")
        self._ingests: dict[str, Ingest] = {}
        self._following: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ends: dict[str, tuple[Source, Ends]] = {}
        self._finding: set[str] = set()
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="headrace-encode")
        self._querying = ThreadPoolExecutor(1, thread_name_prefix="headrace-query")
        # Apart from each other: whoever waits for a broker that is away must not hold up what only computes.
        self._decoding = ThreadPoolExecutor(1, thread_name_prefix="headrace-decode")
        self._blocking = ThreadPoolExecutor(4, thread_name_prefix="headrace-kafka")
        await super().setup(worker)

    async def teardown(self, worker: Any) -> None:
        await super().teardown(worker)
        for task in list(self._tasks):
            task.cancel()
        for pool in (self._encoding, self._querying, self._decoding, self._blocking):
            pool.shutdown(wait=False, cancel_futures=True)

    # -- following the state -------------------------------------------------------------------------------------------

    async def state_adopted(self, replica: Replica) -> None:
        name, state = replica.state.spec.name, replica.state
        ingest = self._ingests.get(name)
        if ingest is not None:
            await ingest.drained(state.epoch)
        # Starting to read asks peers how far they are, and they may be waiting for us: not part of the answer.
        self._spawn(self._follow(replica))

    async def _follow(self, replica: Replica) -> None:
        name = replica.state.spec.name
        async with self._following.setdefault(name, asyncio.Lock()):
            if self.replicas.get(name) is not replica:
                return
            state = replica.state
            mine = self.address in state.readers.values()
            ingest = self._ingests.get(name)
            if ingest is not None and ingest.incarnation != state.incarnation:
                del self._ingests[name]
                await ingest.close()
                ingest = None
            if ingest is None and mine:
                encode = None if state.spec.encoder is None else self._encoder_of(state.spec.encoder, self._encoding)
                if encode is not None:
                    await encode(["."])  # load the model now, not while the first record waits
                ingest = Ingest(self, replica, encode, self._decoding, self._ingest_settings)
                self._ingests[name] = ingest
            if ingest is not None:
                await ingest.follow(state)

    async def release(self, name: str) -> None:
        await super().release(name)
        if (ingest := self._ingests.pop(name, None)) is not None:
            await ingest.close()
        self._ends.pop(name, None)

    def adopt_soon(self, state: CollectionState) -> None:
        """Adopt a state that was fetched, without waiting for what is under way."""
        self._spawn(self.adopt(state))

    def alarm(self, collection: str, text: str) -> None:
        """Have the scheduler keep a sentence that a person should read; while it is away, this worker does."""
        self._spawn(self._tell_alarm(collection, text))

    async def _tell_alarm(self, collection: str, text: str) -> None:
        while (replica := self.replicas.get(collection)) is not None:
            if text not in replica.state.alarms:
                replica.state = replica.state.with_(alarms=(*replica.state.alarms, text))
            try:
                await self.call_scheduler("alarm", collection=collection, text=text)
            except ClusterError as error:
                log.warning("collection %r: an alarm is told again later: %s", collection, error)
                await asyncio.sleep(1.0)
            else:
                return

    def topic_found(self, collection: str, known: str, seen: Seen) -> None:
        """Have the scheduler know of the topic that was found where one with the id `known` was read."""
        if collection not in self._finding:
            self._finding.add(collection)
            self._spawn(self._tell_topic(collection, known, seen))

    async def _tell_topic(self, collection: str, known: str, seen: Seen) -> None:
        """Tried once: the topic's watch finds it again at its next look."""
        try:
            source = self.replica(collection).state.source
            if source is None or source.topic_id != known:
                return
            kafka = dict(self._ingest_settings.reader.kafka)

            def look() -> dict[int, int]:
                return Offsets(source.bootstrap, source.topic, settings=kafka).earliest()

            origins = await asyncio.get_running_loop().run_in_executor(self._blocking, look)
            found = {
                "bootstrap": source.bootstrap,
                "topic": source.topic,
                "partitions": seen.partitions,
                "format": source.format,
                "origins": offsets_to_wire(origins),
                "topic_id": seen.topic_id,
            }
            await self.call_scheduler("topic_found", collection=collection, known=known, source=found, deadline=30.0)
        except HeadraceError as error:
            log.warning("collection %r: its topic is looked at again: %s", collection, error)
        finally:
            self._finding.discard(collection)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)

        def finished(task: asyncio.Task[Any]) -> None:
            self._tasks.discard(task)
            if not task.cancelled() and (error := task.exception()):
                log.error("work in the background failed: %s", error, exc_info=error)

        task.add_done_callback(finished)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _encoder_of(self, stamp: str, pool: ThreadPoolExecutor) -> Encode:
        threads = self._encoder_threads

        def encode(texts: list[str]) -> npt.NDArray[np.float32]:
            encoder = load_encoder(stamp.partition("@")[0], threads)
            if encoder.stamp != stamp:
                raise EncoderError(
                    f"this worker has encoder {encoder.stamp}, the collection was made with {stamp}: vectors of two "
                    "models do not compare; install the same weights everywhere or build a new collection"
                )
            return encoder.encode(texts)

        async def encode_off_loop(texts: list[str]) -> npt.NDArray[np.float32]:
            return await asyncio.get_running_loop().run_in_executor(pool, encode, texts)

        return encode_off_loop

    async def on_encode(self, collection: str, encoder: str, texts: Sequence[str]) -> dict[str, Any]:
        """Vectors of query texts; beside, not behind, what is being ingested."""
        vectors = await self._encoder_of(encoder, self._querying)(list(texts))
        return {"vectors": floats_to_wire(vectors)}

    async def on_offsets(self, collection: str, max_age: float, deadline_s: float = 5.0) -> dict[str, Any]:
        """The topic's end offsets, as they were at most `max_age` seconds ago, and the epoch that they belong to.

        Raises
        ------
        BrokerError
            Kafka does not say.
        StaleEpoch
            Kafka has another topic of that name now. The scheduler is told at once, and what is here is not asked
            about any more: offsets of the new topic say nothing about rows of the old one.
        """
        source = self.replica(collection).state.source
        if source is None:
            return {"offsets": [], "epoch": 0}
        if collection not in self._ends or self._ends[collection][0] != source:  # the topic may have been made anew
            kafka = dict(self._ingest_settings.reader.kafka)
            self._ends[collection] = source, Ends(source.bootstrap, source.topic, kafka, self._blocking)
        asked = self._ends[collection][1]
        try:
            async with asyncio.timeout(deadline_s):
                ends = await asked.known(max_age)
        except TimeoutError as error:
            raise BrokerError(f"Kafka ({source.bootstrap}) did not say within {deadline_s:.3g} s") from error
        if another(source.topic_id, asked.seen.topic_id):
            self.topic_found(collection, source.topic_id, asked.seen)
            raise StaleEpoch(f"topic {source.topic!r} was made anew: its records are not read by {self.address} yet")
        state = self.replica(collection).state
        if state.source != source:
            raise StaleEpoch(f"{self.address} has begun to read another topic for {collection!r}")
        return {"offsets": offsets_to_wire(ends), "epoch": state.epoch}

    async def on_mend(
        self, collection: str, epoch: int, ids: Sequence[Any], anew: Sequence[bool], deadline_s: float
    ) -> dict[str, Any]:
        """Give all copies what the log has of `ids`; see `Mender`. Answers which could not be mended, and why."""
        replica = self._at(collection, epoch)
        ingest = self._ingests.get(collection)
        if ingest is None or not ingest.source.assigned:
            raise StaleEpoch(f"{self.address} does not read the topic of {collection!r} yet")
        loop = asyncio.get_running_loop()

        async def blocking(function: Any, *args: Any) -> Any:
            return await loop.run_in_executor(self._blocking, function, *args)

        failed = await Mender(self, ingest, replica.state, blocking, deadline_s).mend(ids, anew)
        return {"failed": [[row_id, why] for row_id, why in failed.items()]}

    async def on_ingest_status(self, collection: str) -> dict[str, Any]:
        ingest = self._ingests.get(collection)
        return {
            "ingest": None if ingest is None else ingest.status(),
            "reading": [] if ingest is None else sorted(ingest.source.assigned),
            "clock": self.clock(),
        }
