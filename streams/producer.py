"""The one way to write records to Kafka: encoded, checked and acknowledged."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any

from confluent_kafka import KafkaError, KafkaException, Producer

from headrace.gpu.errors import BrokerError, ConfigError, ProduceError, RecordError, TopicError
from headrace.streams.attributes import short
from headrace.streams.clients import COMMON_SETTINGS
from headrace.streams.delivery import Delivered, Flight
from headrace.streams.encode import RESERVED, encode_json, encode_key
from headrace.streams.link import Link
from headrace.streams.topics import Offsets, topic_partitions

__all__ = ["PROFILES", "Delivered", "Offsets", "RecordProducer", "topic_partitions"]

log = logging.getLogger("headrace.streams")

Headers = Sequence[tuple[str, bytes | None]]

PROFILES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "durable": {
            "acks": "all",
            "enable.idempotence": "true",
            "linger.ms": "3",
            "compression.type": "lz4",
            "batch.size": "65536",
        },
        "fast": {
            "acks": "1",
            "linger.ms": "0",
            "compression.type": "none",
            # Without idempotence a retried batch could be overtaken, and an older version of an id would win.
            "max.in.flight.requests.per.connection": "1",
        },
    }
)
"""What people publish for these two aims. durable: no loss, no duplicate. fast: the leader's word is enough."""

# Java's default, which all Kafka clients know: every producer, in whatever language, must map an id to the same topic
# partition, or two versions of one id could not be compared. (librdkafka's own default, CRC32, is known to few.)
_PARTITIONER = "murmur2_random"
# A topic that is made anew may have another number of topic partitions, by which ids map otherwise. librdkafka looks
# every 5 minutes; as often as the topic's reader does (`TopicWatch`) costs one small request a second.
_LOOK_AT_TOPIC_MS = "1000"
_DEFAULT_MAX_BYTES = 1_000_000
_QUEUE_PATIENCE = 10.0
"""Seconds that `send` waits for room in a full queue."""


class RecordProducer:
    """Writes records of one topic.

    Parameters
    ----------
    bootstrap, topic : str
    profile : {"durable", "fast"}
        See `PROFILES`.
    settings : Mapping of str to str, optional
        Further librdkafka settings; they win over the profile's.
    create_topic : bool
        Let the broker create the topic now if it does not know it, instead of refusing it.
    deadline : float
        Seconds to wait for a broker.

    Raises
    ------
    ConfigError
        An unknown profile or setting, another partitioner, or no acknowledgements.
    BrokerError
        No broker answers.
    TopicError
        There is no such topic.

    Notes
    -----
    Thread-safe. Every call may block for a while (a full queue, a broker that is away): call it off the event loop.
    Threads that share a producer use `write`, which waits for its own records only; `send` and `flush` share one list.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        *,
        profile: str = "durable",
        settings: Mapping[str, str] | None = None,
        create_topic: bool = False,
        deadline: float = 5.0,
    ) -> None:
        if profile not in PROFILES:
            raise ConfigError(f"unknown producer profile {profile!r}: use {' or '.join(map(repr, PROFILES))}")
        given = dict(settings or {})
        if given.get("partitioner", _PARTITIONER) != _PARTITIONER:
            raise ConfigError(f"partitioner {given['partitioner']!r} would map ids otherwise: use {_PARTITIONER!r}")
        config: dict[str, Any] = {**COMMON_SETTINGS, **PROFILES[profile], "partitioner": _PARTITIONER}
        config["topic.metadata.refresh.interval.ms"] = _LOOK_AT_TOPIC_MS
        if create_topic:
            config["allow.auto.create.topics"] = "true"
        config.update(given)
        config["bootstrap.servers"] = bootstrap
        self.bootstrap = bootstrap
        self.topic = topic
        if config["acks"] == "0":
            raise ConfigError("acks='0' acknowledges nothing, so nothing could be waited for: use '1' or 'all'")
        self._polling = threading.Lock()
        self._dropped: list[bytes | None] = []
        self._sent = Flight(self._dropped)
        self._swap = threading.Lock()
        self._link = Link(
            bootstrap, f"producer of topic {topic!r}", "records wait here, and are sent by itself when it is back"
        )
        try:
            self._producer = Producer({**config, **self._link.settings}, logger=self._link)
        except KafkaException as failure:
            raise ConfigError(f"librdkafka refuses these producer settings: {failure.args[0].str()}") from failure
        self._max_bytes = int(config.get("message.max.bytes", _DEFAULT_MAX_BYTES))
        topic_partitions(bootstrap, topic, deadline, settings=given, create=create_topic)

    def send(self, key: bytes | None, value: bytes | None, headers: Headers | None = None) -> None:
        """Put one record on its way; `flush` says what became of it.

        Raises
        ------
        RecordError
            The record is longer than ``message.max.bytes``.
        ProduceError
            The queue stays full, because the broker is away or slow.
        """
        self.check_size(key, value, headers)
        with self._swap:  # counted before a flush can take the list away
            flight = self._sent
            flight.begin()
        self._send(flight, key, value, headers)

    def send_json(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Put rows on their way as JSON records: `id`, `text` or `vector`, and attributes beside them.

        All rows are encoded before the first is sent, so that a bad one leaves nothing half done.

        Raises
        ------
        RecordError
            A row that no collection would take; nothing was sent.
        ProduceError
            As `send`.
        """
        for key, value in [_encode_row(row) for row in rows]:
            self.send(key, value)

    def send_deletes(self, ids: Iterable[str | int]) -> None:
        """Put a tombstone for each id on its way. Raises as `send_json`."""
        for key in [encode_key(id_) for id_ in ids]:
            self.send(key, None)

    def flush(self, deadline: float = 10.0) -> Delivered:
        """Wait for all records sent since the last flush, from whatever thread.

        Raises
        ------
        ProduceError
            Not all have been acknowledged within `deadline` seconds (they may still be), or Kafka has refused some.
            Either way the next flush begins anew.
        """
        with self._swap:
            flight, self._sent = self._sent, Flight(self._dropped)
        return self._wait(flight, deadline)

    def write(
        self, records: Iterable[tuple[bytes | None, bytes | None, Headers | None]], deadline: float = 10.0
    ) -> Delivered:
        """Send ``(key, value, headers)`` records and wait for just these; raises as `send` and `flush`."""
        flight = Flight(self._dropped)
        rows = list(records)
        for record in rows:
            self.check_size(*record)
        for record in rows:
            flight.begin()
            self._send(flight, *record)
        return self._wait(flight, deadline)

    def close(self, deadline: float = 5.0) -> None:
        """Give what is still queued `deadline` seconds, then drop it."""
        if not self._producer.flush(deadline):
            return
        # What is left may be librdkafka's own events: the purged records' callbacks tell how many were records.
        self._producer.purge()
        self._producer.flush(1.0)
        if dropped := len(self._dropped):
            log.warning("%d records for topic %s were dropped: %s did not answer", dropped, self.topic, self.bootstrap)

    def __enter__(self) -> RecordProducer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_size(self, key: bytes | None, value: bytes | None, headers: Headers | None) -> None:
        """Raise `RecordError` for a record that is larger than may be sent."""
        size = len(key or b"") + len(value or b"")
        size += sum(len(name) + len(content or b"") for name, content in headers or ())
        if size > self._max_bytes:
            raise RecordError(
                f"the record with key {short(key)} has {size} bytes, more than message.max.bytes of {self._max_bytes}: "
                "shorten it, or raise that setting here and on the broker"
            )

    def _send(self, flight: Flight, key: bytes | None, value: bytes | None, headers: Headers | None) -> None:
        until = time.monotonic() + _QUEUE_PATIENCE
        while True:
            try:
                self._producer.produce(
                    self.topic, value=value, key=key, headers=list(headers or ()), on_delivery=flight.arrived
                )
                break
            except BufferError:
                if time.monotonic() < until:
                    self._producer.poll(0.05)
                    continue
                error = KafkaError(KafkaError._QUEUE_FULL)
            except KafkaException as failure:
                error = failure.args[0]
            with flight.lock:
                flight.waiting -= 1
            raise self._error(error, f"the record with key {short(key)} was not sent")
        self._producer.poll(0)

    def _wait(self, flight: Flight, deadline: float) -> Delivered:
        until = time.monotonic() + deadline
        self._producer.flush(0)  # do not linger, somebody waits: 0.2 instead of 3.3 ms for a lone record
        while flight.waiting and (left := until - time.monotonic()) > 0:
            # One thread polls for all; poll returns with the first callbacks, and the next thread looks at its own.
            if not self._polling.acquire(timeout=left):
                break
            try:
                if flight.waiting:
                    self._producer.poll(min(left, 0.1))
            finally:
                self._polling.release()
        with flight.lock:
            waiting, failed, landed = flight.waiting, list(flight.failed), flight.landed()
        if landed.count:
            self._link.answered()
        total = landed.count + len(failed) + waiting
        if failed:
            key, error = failed[0]
            raise self._error(
                error, f"{len(failed)} of {total} records were refused, first the one with key {short(key)}"
            )
        if waiting:
            raise ProduceError(
                f"{waiting} of {total} records for topic {self.topic!r} were not acknowledged by {self.bootstrap} "
                f"within {deadline:g} s: check the broker; they may still arrive"
            )
        return landed

    def _error(self, error: KafkaError, what: str) -> BrokerError:
        where = f"{what} by topic {self.topic!r} at {self.bootstrap} ({error.str()})"
        if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC):
            return TopicError(f"{where}: create the topic")
        if error.code() in (KafkaError.MSG_SIZE_TOO_LARGE, KafkaError.RECORD_LIST_TOO_LARGE):
            return ProduceError(f"{where}: raise max.message.bytes of the topic, or send shorter records")
        if error.fatal():
            return ProduceError(f"{where}: this producer cannot go on, make another")
        return ProduceError(f"{where}: check the broker, then send again")


def _encode_row(row: Mapping[str, Any]) -> tuple[bytes, bytes]:
    if "id" not in row:
        raise RecordError(f"a row with the fields {sorted(map(str, row))} has no id: give each row an 'id'")
    attributes = {name: value for name, value in row.items() if name not in RESERVED}
    return encode_json(row["id"], text=row.get("text"), vector=row.get("vector"), attributes=attributes)
