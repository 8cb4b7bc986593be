"""Records that cannot be used go to a topic of their own, with the reason and the place they came from."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

from headrace.gpu.errors import BrokerError, TopicError
from headrace.streams.batches import RawBatch, Refusal
from headrace.streams.clients import COMMON_SETTINGS, KafkaLog
from headrace.streams.producer import Delivered, RecordProducer
from headrace.streams.topics import Offsets

__all__ = ["SUFFIX", "DeadLetter", "DeadLetters", "read_dead_letters"]

SUFFIX = ".dead-letters"
MOST_BYTES = 64 * 1024
"""Of a key or a value that are kept: a dead letter must never itself be too large to be written."""


@dataclass(frozen=True)
class DeadLetter:
    """One refused record.

    Attributes
    ----------
    reason : str
    topic_partition, offset : int
        Where the record was.
    key, value : bytes or None
        As they were, cut after 64 KiB.
    size : int
        Bytes of the whole value.
    """

    reason: str
    topic_partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    size: int


class DeadLetters:
    """Writes the refused records of `topic` to ``topic + ".dead-letters"``.

    The broker is made to create that topic here, so that the first letter does not wait for it (0.5 s); where brokers
    create no topics, create it beforehand.

    Parameters
    ----------
    bootstrap : str
    topic : str
        The topic that the records came from.
    settings : Mapping of str to str, optional
        Further librdkafka settings.

    Raises
    ------
    BrokerError, TopicError
        No broker answers; there is no such topic, and it was not created.

    Notes
    -----
    Thread-safe; blocks: call it through an executor.
    """

    def __init__(self, bootstrap: str, topic: str, *, settings: Mapping[str, str] | None = None) -> None:
        self.topic = topic + SUFFIX
        self._producer = RecordProducer(bootstrap, self.topic, settings=settings, create_topic=True)

    def write(self, raw: RawBatch, refusals: Iterable[Refusal], deadline: float = 10.0) -> Delivered:
        """Write the refused records of a batch and wait until Kafka has them.

        Key and value are the record's own, cut after 64 KiB. Its headers are kept if they are not longer, followed by
        ``headrace-reason``, ``-topic``, ``-topic-partition``, ``-offset``, ``-timestamp`` (ms) and ``-size`` (bytes of
        the whole value).

        Raises
        ------
        ProduceError
            Not acknowledged within `deadline` seconds. To write them again is harmless: the place says which are equal.
        """
        return self._producer.write([_letter(raw, refusal) for refusal in refusals], deadline)

    def close(self) -> None:
        """Let go of Kafka."""
        self._producer.close()


def read_dead_letters(
    bootstrap: str,
    topic: str,
    limit: int = 100,
    *,
    settings: Mapping[str, str] | None = None,
    deadline: float = 10.0,
) -> list[DeadLetter]:
    """The newest `limit` dead letters of `topic`, oldest first; none if there is no dead-letter topic.

    Raises
    ------
    BrokerError
        Kafka did not answer within `deadline` seconds.
    """
    until = time.monotonic() + deadline
    try:
        places = Offsets(bootstrap, topic + SUFFIX, settings=settings, deadline=deadline)
    except TopicError:
        return []
    ends = places.latest(deadline)
    starts = {number: max(low, ends[number] - limit) for number, low in places.earliest(deadline).items()}
    unread = {number for number, low in starts.items() if low < ends[number]}
    config = {
        **COMMON_SETTINGS,
        **(settings or {}),
        "bootstrap.servers": bootstrap,
        "group.id": "headrace-dead-letters",
        "enable.auto.commit": "false",
        "enable.partition.eof": "true",  # a log may end with what is no record
        "fetch.wait.max.ms": "10",
    }
    found: list[Message] = []
    with contextlib.closing(Consumer(config, logger=KafkaLog())) as consumer:
        consumer.assign([TopicPartition(topic + SUFFIX, number, starts[number]) for number in sorted(unread)])
        while unread:
            if time.monotonic() > until:
                raise BrokerError(f"{bootstrap} did not give the dead letters of {topic!r} within {deadline:g} s")
            message = consumer.poll(0.1)
            if message is None:
                continue
            if (error := message.error()) is not None:
                if error.code() != KafkaError._PARTITION_EOF:
                    raise BrokerError(f"{bootstrap} does not give the dead letters of {topic!r}: {error.str()}")
                unread.discard(message.partition())
            else:
                found.append(message)
    found.sort(key=lambda message: message.timestamp()[1])
    return [_read(message) for message in found[-limit:]]


def _letter(raw: RawBatch, refusal: Refusal) -> tuple[bytes | None, bytes | None, list[tuple[str, bytes | None]]]:
    row = refusal.row
    key, value, headers = raw.keys[row], raw.values[row], raw.headers[row] or []
    if sum(len(name) + len(content or b"") for name, content in headers) > MOST_BYTES:
        headers = []
    told = {
        "reason": refusal.reason,
        "topic": raw.topic,
        "topic-partition": raw.topic_partitions[row],
        "offset": raw.offsets[row],
        "timestamp": raw.timestamps[row],
        "size": len(value or b""),
    }
    # Ours come last, and the last of a name counts: a record cannot give itself another reason.
    headers = [*headers, *((f"headrace-{name}", str(what).encode(errors="replace")) for name, what in told.items())]
    return key and key[:MOST_BYTES], value and value[:MOST_BYTES], headers


def _read(message: Message) -> DeadLetter:
    received = cast("list[tuple[str, bytes | None]]", message.headers() or [])
    headers = {name: content or b"" for name, content in received}
    return DeadLetter(
        reason=headers.get("headrace-reason", b"").decode(),
        topic_partition=int(headers.get("headrace-topic-partition", b"-1")),
        offset=int(headers.get("headrace-offset", b"-1")),
        key=message.key(),
        value=message.value(),
        size=int(headers.get("headrace-size", b"0")),
    )
