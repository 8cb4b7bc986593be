"""A client's writes: records into the collection's topic, and the session that is to see them."""

from __future__ import annotations

import asyncio
import time

from headrace.cluster.state import CollectionSpec
from headrace.gpu.errors import CollectionError, ConfigError
from headrace.pipeline import config
from headrace.pipeline.arguments import seconds
from headrace.pipeline.reads import Router
from headrace.pipeline.results import Write
from headrace.pipeline.rows_in import Record
from headrace.pipeline.session import Session
from headrace.streams.producer import RecordProducer

__all__ = ["Writer"]


class Writer:
    """Writes to one collection's topic. Belongs to one event loop.

    Parameters
    ----------
    spec : CollectionSpec
    router : Router
        Knows the topic, and who must have applied what is written.
    session : Session
        Told of what was written.
    """

    def __init__(self, spec: CollectionSpec, router: Router, session: Session) -> None:
        self._spec, self._router, self._session = spec, router, session
        self._producer: RecordProducer | None = None
        self._producing = asyncio.Lock()

    async def write(self, records: list[Record], wait: str | None, deadline: float) -> Write:
        """Write records, and return once Kafka has them, or once every copy has applied them (`wait`).

        Raises
        ------
        ConfigError
            `wait` is neither "searchable" nor None, or the deadline cannot be.
        CollectionNotFound, CollectionError, ProduceError, BrokerError, ConsistencyTimeout
        """
        if wait not in (None, "searchable"):
            raise ConfigError(f"wait={wait!r} is not known: use 'searchable', or None to return on Kafka's word")
        deadline = seconds("deadline", deadline, 10.0)
        until = time.monotonic() + deadline
        if not records:
            return Write({}, 0, ())
        await self._router.state()  # at most a second old: nothing is written for a collection that was dropped
        producer = await self._producer_of_topic(deadline)
        delivered = await asyncio.to_thread(producer.write, records, deadline)
        self._session.wrote(self._router.topic_id, delivered.offsets)
        if wait == "searchable":
            left = max(0.001, until - time.monotonic())
            await self._router.wait_everywhere(delivered.offsets, left)
        acks = tuple((self._id(key), tp, offset) for key, tp, offset in delivered.acks)
        return Write(delivered.offsets, delivered.count, acks)

    async def close(self) -> None:
        """Close the connection to Kafka."""
        if self._producer is not None:
            await asyncio.to_thread(self._producer.close)
            self._producer = None

    def _id(self, key: bytes | None) -> str | int:
        text = (key or b"").decode()
        return int(text) if self._spec.ids == "integer" else text

    async def _producer_of_topic(self, deadline: float) -> RecordProducer:
        name = self._spec.name
        async with self._producing:
            if self._producer is None:
                source = (await self._router.state()).source or (await self._router.state(newest=True)).source
                if source is None:
                    raise CollectionError(
                        f"collection {name!r} has no topic yet: call ingest('localhost:9092', topic='{name}') first"
                    )
                self._producer = await asyncio.to_thread(
                    RecordProducer, source.bootstrap, source.topic, settings=config.kafka_settings(), deadline=deadline
                )
            return self._producer
