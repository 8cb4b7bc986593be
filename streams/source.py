"""Headrace's nodes for Streamz: a Kafka source that loses nothing, and a step that may take its time.

Streamz' own Kafka source drops tombstones, opens a consumer for each batch, commits out of order and knows no
back-pressure.
Here a batch is done when `emit` has returned from the whole graph without an error; until then the source keeps it
and tries again, and commits never pass it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from streamz import Stream
from streamz.sources import Source

from headrace.gpu.errors import CollectionNotFound, HeadraceError
from headrace.streams.batches import RawBatch
from headrace.streams.link import Away
from headrace.streams.reader import Reader, ReaderSettings
from headrace.streams.topic_identity import Seen
from headrace.streams.topic_watch import TopicWatch
from headrace.streams.watermark import OffsetTracker

__all__ = ["from_kafka_log", "stage"]

log = logging.getLogger("headrace.streams")

_TRIES_BEFORE_SPLITTING = 3


@Stream.register_api()
class stage(Stream):  # type: ignore[misc]
    """Await ``func(x)`` for every element and pass on what it returns; an error goes back to whoever emitted.

    Parameters
    ----------
    func : async callable
    parallelism : int
        Elements that may be inside `func` at once; others wait their turn.
    """

    def __init__(
        self, upstream: Any, func: Callable[[Any], Awaitable[Any]], *, parallelism: int = 1, **kwargs: Any
    ) -> None:
        self.func = func
        self._turns = asyncio.Semaphore(parallelism)
        super().__init__(upstream, **kwargs)

    def update(self, x: Any, who: Any = None, metadata: Any = None) -> Any:
        return asyncio.ensure_future(self._work(x, metadata))

    async def _work(self, x: Any, metadata: Any) -> None:
        async with self._turns:
            result = await self.func(x)
        await asyncio.gather(*self._emit(result, metadata=metadata))


@Stream.register_api(staticmethod)
class from_kafka_log(Source):  # type: ignore[misc]
    """Micro-batches (`RawBatch`) of chosen topic partitions, each as soon as there is something.

    Parameters
    ----------
    bootstrap, topic, group : str
    partitions : int, optional
        Topic partitions that the topic should have: with it, the topic itself is watched (see `TopicWatch`).
    settings : ReaderSettings, optional
    alarm : callable, optional
        Called on the event loop with a sentence when offsets were lost, or the topic is not what it was.
    topic_id : str
        Kafka's id of the topic that is to be read; "" if that is not known.
    found : callable, optional
        Called on the event loop with the topic (`Seen`) when its id is another than that. The offsets of two topics do
        not compare: whoever keeps what has been read must begin anew, with another source.
    refuse : async callable, optional
        Called with a batch of one record and a reason when the graph fails on it again and again for no foreseen
        reason.
    retry_delay, retry_delay_max : float
        Seconds between tries of a batch.

    Notes
    -----
    All methods are to be called on the event loop. Batches may finish in any order; `stable` and Kafka's committed
    offsets only ever rise over a gapless stretch.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        group: str,
        *,
        partitions: int | None = None,
        settings: ReaderSettings | None = None,
        alarm: Callable[[str], None] | None = None,
        topic_id: str = "",
        found: Callable[[Seen], None] | None = None,
        refuse: Callable[[RawBatch, str], Awaitable[None]] | None = None,
        retry_delay: float = 0.05,
        retry_delay_max: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.stopped: bool = True
        super().__init__(asynchronous=True, **kwargs)
        self.tracker = OffsetTracker()
        self.stable: dict[int, int] = {}
        self._delays = retry_delay, retry_delay_max
        self._refuse = refuse
        self._tasks: set[asyncio.Task[None]] = set()
        self._event_loop = asyncio.get_running_loop()
        loop, call_alarm = self._event_loop, alarm or log.error
        watched = partitions is not None
        self.reader = Reader(
            bootstrap,
            topic,
            group,
            hand_over=lambda batch: _on_loop(loop, self._begin, batch),
            alarm=lambda text: _on_loop(loop, call_alarm, text),
            settings=settings,
            fell_short=self._fell_short if watched else None,
        )
        self._watch: TopicWatch | None = None
        if partitions is not None:
            self._watch = TopicWatch(
                bootstrap,
                topic,
                partitions,
                alarm=lambda text: _on_loop(loop, call_alarm, text),
                found=lambda seen: None if found is None else _on_loop(loop, found, seen),
                topic_id=topic_id,
                link=self.reader.link,
                settings=settings.kafka if settings else None,
            )

    def expect(self, topic_id: str) -> None:
        """The topic is to be the one with this id."""
        if self._watch is not None:
            self._watch.topic_id = topic_id

    def _fell_short(self, sentence: str) -> None:
        assert self._watch is not None
        self._watch.fell_short(sentence)

    def start(self) -> None:
        if self.stopped:
            self.stopped, self.started = False, True
            self.reader.start()
            if self._watch is not None:
                self._watch.start()

    async def halt(self) -> None:
        """End reading; batches under way are given up (they will be read again by whoever takes over)."""
        self.stopped = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ends = [self.reader.stop] if self._watch is None else [self.reader.stop, self._watch.stop]
        await asyncio.gather(*(asyncio.to_thread(end) for end in ends))

    def assign(self, starts: dict[int, int]) -> None:
        """Read exactly these topic partitions; new ones from the offset given."""
        for tp in set(self.stable) - set(starts):
            del self.stable[tp]
            self.tracker.drop([tp])
        for tp, start in starts.items():
            if tp not in self.stable:
                self.stable[tp] = start
                self.tracker.start(tp, start)
        self.reader.assign(starts)

    @property
    def assigned(self) -> frozenset[int]:
        return frozenset(self.stable)

    @property
    def lag(self) -> int:
        """Records known to be in Kafka and not yet applied everywhere."""
        ends = self.reader.ends()
        return sum(max(0, ends.get(tp, offset) - offset) for tp, offset in self.stable.items())

    @property
    def away(self) -> Away | None:
        """The outage of Kafka's brokers that the reader or the watch has met; None while they answer."""
        return self.reader.link.away

    def _begin(self, batch: RawBatch) -> None:
        if self.stopped:
            return
        task = self._event_loop.create_task(self._see_through(batch))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _see_through(self, batch: RawBatch) -> None:
        token = self.tracker.begin(batch.ranges)
        await self._until_done(batch)
        risen = self.tracker.done(token)
        self.stable.update({tp: offset for tp, offset in risen.items() if tp in self.stable})
        self.reader.commit(risen)
        self.reader.finished(batch)

    async def _until_done(self, batch: RawBatch) -> None:
        delay, longest = self._delays
        unforeseen = 0
        while True:
            try:
                # Not `emit`: Tornado would let the steps go on when this task is cancelled.
                await asyncio.gather(*self._emit(batch))
                return
            except CollectionNotFound as error:
                log.info("a batch of %d records is put by, this worker will hear why: %s", len(batch.keys), error)
            except HeadraceError as error:
                log.warning("a batch of %d records is tried again: %s", len(batch.keys), error)
            except Exception as error:
                unforeseen += 1
                log.exception("a batch of %d records failed", len(batch.keys))
                if unforeseen >= _TRIES_BEFORE_SPLITTING and self._refuse is not None and batch.keys:
                    await self._isolate(batch, error)
                    return
            await asyncio.sleep(delay)
            delay = min(2 * delay, longest)

    async def _isolate(self, batch: RawBatch, error: Exception) -> None:
        """Find the record on which the graph fails: halves are tried by themselves, their offsets counted at the
        end.
        """
        if len(batch.keys) == 1 and self._refuse is not None:
            await self._refuse(batch, f"the record made the ingest graph fail: {type(error).__name__}: {error}")
        else:
            middle = len(batch.keys) // 2
            await self._until_done(_slice(batch, slice(0, middle)))
            await self._until_done(_slice(batch, slice(middle, None)))
        await self._until_done(replace(_slice(batch, slice(0, 0)), ranges=batch.ranges))


def _slice(batch: RawBatch, rows: slice) -> RawBatch:
    return replace(
        batch,
        keys=batch.keys[rows],
        values=batch.values[rows],
        headers=batch.headers[rows],
        topic_partitions=batch.topic_partitions[rows],
        offsets=batch.offsets[rows],
        timestamps=batch.timestamps[rows],
        ranges={},
    )


def _on_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *args)
