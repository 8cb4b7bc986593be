"""The dead letters of one collection: written by its reader, and counted, those from before it was there too."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from headrace.cluster.state import Source
from headrace.gpu.errors import BrokerError, TopicError
from headrace.streams.batches import RawBatch, Refusal
from headrace.streams.dead_letters import SUFFIX, DeadLetters
from headrace.streams.topics import Offsets

__all__ = ["Letters"]

log = logging.getLogger("headrace.pipeline")

_LOOK_AGAIN = 5.0
_PATIENCE = 2.0
"""Seconds between two looks at how many dead letters there are while Kafka does not say, and for one of them."""


class Letters:
    """Belongs to the worker's event loop.

    Parameters
    ----------
    name : str
        The collection's.
    source : Source
        Its topic.
    kafka : mapping of str to str
        Settings for librdkafka.
    """

    def __init__(self, name: str, source: Source, kafka: Mapping[str, str]) -> None:
        self._name, self._source, self._kafka = name, source, dict(kafka)
        self._written: DeadLetters | None = None
        self._counting: asyncio.Task[None] | None = None
        self.ends: dict[int, int] = {}
        """How far the topic of dead letters goes, by topic partition, as far as that is known."""

    def count(self) -> None:
        """Find the dead letters that are there already, once: of what a worker counted nothing is left when it ends."""
        if self._counting is None:
            self._counting = asyncio.get_running_loop().create_task(self._count())

    async def write(self, raw: RawBatch, refusals: list[Refusal]) -> None:
        """Write refused records and return when Kafka has them.

        Parameters
        ----------
        refusals : list of Refusal
            At least one.

        Raises
        ------
        ProduceError, BrokerError, TopicError
        """
        first = refusals[0]
        log.warning(
            "collection %r: %d records to the dead letters; the first, topic partition %d offset %d: %s",
            self._name,
            len(refusals),
            raw.topic_partitions[first.row],
            raw.offsets[first.row],
            first.reason,
        )

        def write() -> Mapping[int, int]:
            if self._written is None:
                self._written = DeadLetters(self._source.bootstrap, self._source.topic, settings=self._kafka)
            return self._written.write(raw, refusals).offsets

        self._known(await asyncio.to_thread(write))

    async def close(self) -> None:
        """Let go of Kafka. To be called when nothing is written any more."""
        if self._counting is not None:
            self._counting.cancel()
        if self._written is not None:
            await asyncio.to_thread(self._written.close)

    async def _count(self) -> None:
        def look() -> dict[int, int]:
            bootstrap, topic = self._source.bootstrap, self._source.topic + SUFFIX
            return Offsets(bootstrap, topic, settings=self._kafka, deadline=_PATIENCE).latest(_PATIENCE)

        while True:
            try:
                self._known(await asyncio.to_thread(look))
            except TopicError:
                return  # there are none
            except BrokerError as error:
                log.info("collection %r: its dead letters are counted later: %s", self._name, error)
                await asyncio.sleep(_LOOK_AGAIN)
            else:
                return

    def _known(self, ends: Mapping[int, int]) -> None:
        for tp, end in ends.items():
            self.ends[tp] = max(self.ends.get(tp, 0), end)
