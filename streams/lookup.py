"""Reading the log once more for some keys only: what are the newest records of these ids?"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from headrace.gpu.errors import BrokerError
from headrace.streams.batches import RawBatch
from headrace.streams.consumer import ReaderSettings, connect

__all__ = ["Looked", "look_up"]

_KEPT = 32
_AT_ONCE = 4096
_GROUP = "headrace-repair"

Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Looked:
    """The newest records of the keys asked for.

    Attributes
    ----------
    raw : RawBatch
        At most 32 a key and topic partition, because the last may be one that cannot be used.
    cut : set of bytes
        Keys that have more.
    """

    raw: RawBatch
    cut: set[bytes]


@dataclass(slots=True)
class _Seen:
    messages: dict[tuple[int, bytes], deque[Message]] = field(default_factory=dict)
    cut: set[bytes] = field(default_factory=set)

    def add(self, partition: int, key: bytes, message: Message) -> None:
        kept = self.messages.setdefault((partition, key), deque(maxlen=_KEPT))
        if len(kept) == _KEPT:
            self.cut.add(key)
        kept.append(message)


def look_up(
    bootstrap: str,
    topic: str,
    keys: Collection[bytes],
    spans: Mapping[int, Span],
    settings: ReaderSettings,
    deadline: float,
    going_on: Callable[[], bool] = lambda: True,
) -> Looked:
    """Read the offsets ``[low, high)`` of some topic partitions and keep the records of some keys.

    Blocks: call it off the event loop. It reads every record of the spans, because Kafka has no index by key.

    Parameters
    ----------
    bootstrap, topic : str
    keys : collection of bytes
    spans : mapping of topic partition to (low, high)
    settings : ReaderSettings
    deadline : float
        Seconds.
    going_on : callable
        False ends the reading.

    Raises
    ------
    BrokerError
        The log was not read to the end in time, or no longer begins where the spans do.
    """
    spans = {partition: span for partition, span in spans.items() if span[0] < span[1]}
    seen = _Seen()
    if spans and keys:
        stopping = threading.Event()
        timer = threading.Timer(deadline, stopping.set)
        timer.daemon = True
        timer.start()
        try:
            consumer = connect(bootstrap, topic, _GROUP, settings, lambda *_: None, stopping)
            if consumer is None:
                raise BrokerError(f"no Kafka broker answered at {bootstrap} within {deadline:g} s")
            try:
                _read(consumer, topic, frozenset(keys), spans, seen, time.monotonic() + deadline, going_on)
            finally:
                consumer.close()
        finally:
            timer.cancel()
    messages = [message for kept in seen.messages.values() for message in kept]
    messages.sort(key=lambda message: (message.partition() or 0, message.offset() or 0))
    return Looked(_raw(topic, messages), seen.cut)


def _read(
    consumer: Consumer,
    topic: str,
    keys: frozenset[bytes],
    spans: Mapping[int, Span],
    seen: _Seen,
    until: float,
    going_on: Callable[[], bool],
) -> None:
    left = dict(spans)
    consumer.assign([TopicPartition(topic, partition, low) for partition, (low, _) in spans.items()])
    while left:
        if time.monotonic() >= until or not going_on():
            raise BrokerError(
                f"topic {topic!r}: {sum(high - low for low, high in left.values())} offsets of its log were not read "
                "in time; allow more (deadline=)"
            )
        for message in consumer.consume(_AT_ONCE, 0.1):
            partition, offset, error = message.partition(), message.offset(), message.error()
            if error is not None and error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):
                raise BrokerError(f"topic {topic!r}: its log was cut while it was read; verify again")
            if partition is None or offset is None or partition not in left:
                continue
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                continue  # librdkafka connects again by itself
            high = left[partition][1]
            key = message.key() if error is None else None
            if key is not None and key in keys and offset < high:
                seen.add(partition, key, message)
            if offset >= high - (error is None):
                del left[partition]
                consumer.pause([TopicPartition(topic, partition)])


def _raw(topic: str, messages: list[Message]) -> RawBatch:
    count = len(messages)
    return RawBatch(
        topic=topic,
        keys=[message.key() for message in messages],
        values=[message.value() for message in messages],
        headers=[message.headers() for message in messages],  # type: ignore[misc]  # bytes, never text
        topic_partitions=np.fromiter((message.partition() for message in messages), np.int32, count),
        offsets=np.fromiter((message.offset() for message in messages), np.int64, count),
        timestamps=np.fromiter((message.timestamp()[1] for message in messages), np.int64, count),
        ranges={},
        pulled=time.time(),
    )
