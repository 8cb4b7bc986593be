"""What a topic is: how many topic partitions it has, and where their logs begin and end."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from headrace.gpu.errors import ConfigError, TopicError
from headrace.streams.clients import COMMON_SETTINGS, KafkaLog, is_embedded, no_broker, retriable
from headrace.streams.topic_identity import Seen

__all__ = ["Offsets", "id_of", "topic_partitions"]

log = logging.getLogger("headrace.streams")

_PAUSE = 0.02
"""Seconds between two attempts while no broker answers."""

_NO_ID = "A" * 22
"""A UUID of zeros, as Kafka writes them."""

_UNKNOWN = (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError._UNKNOWN_TOPIC, KafkaError._UNKNOWN_PARTITION)


def topic_partitions(
    bootstrap: str,
    topic: str,
    deadline: float = 5.0,
    *,
    settings: Mapping[str, str] | None = None,
    create: bool = False,
) -> int:
    """How many topic partitions `topic` has. Blocks for at most `deadline` seconds: call it off the event loop.

    With `create`, a broker that creates topics by itself is made to create this one, with its default number.

    Raises
    ------
    BrokerError
        No broker answers at `bootstrap`.
    TopicError
        There is no such topic.
    """
    if create:
        settings = {**(settings or {}), "allow.auto.create.topics": "true"}
    return _count(_admin(bootstrap, settings), bootstrap, topic, deadline, create)


def id_of(admin: AdminClient, topic: str, cluster_id: str | None, deadline: float) -> str:
    """Kafka's own id of a topic that is there: another one has another, though its name be the same.

    "" where there is none: brokers before Kafka 2.8, and the embedded one, which cannot even be asked.

    Raises
    ------
    KafkaException
        No answer within `deadline` seconds, or an error.
    """
    return "" if is_embedded(cluster_id) else _seen(_described(admin, topic, deadline), deadline).topic_id


def _described(admin: AdminClient, topic: str, deadline: float) -> Future[Any]:
    return admin.describe_topics(TopicCollection([topic]), request_timeout=deadline)[topic]


def _seen(described: Future[Any], deadline: float) -> Seen:
    try:
        found = described.result(2 * deadline)
    except TimeoutError as failure:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from failure
    topic_id = str(found.topic_id)
    return Seen("" if topic_id == _NO_ID else topic_id, len(found.partitions))


class Offsets:
    """Where the logs of one topic begin and end, asked of Kafka each time.

    Parameters
    ----------
    bootstrap, topic : str
    settings : Mapping of str to str, optional
        Further librdkafka settings, for TLS and SASL.
    deadline : float
        Seconds to wait for a broker.

    Attributes
    ----------
    partitions : int
        The number of topic partitions when this object was made.

    Raises
    ------
    BrokerError, TopicError
        As `topic_partitions`.

    Notes
    -----
    Thread-safe, and it blocks: call it through an executor. One round trip to each leader: 0.5 ms on the loopback.
    """

    def __init__(
        self, bootstrap: str, topic: str, *, settings: Mapping[str, str] | None = None, deadline: float = 5.0
    ) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._admin = _admin(bootstrap, settings)
        self.partitions = _count(self._admin, bootstrap, topic, deadline, create=False)
        self._embedded: bool | None = None

    def latest(self, deadline: float = 5.0) -> dict[int, int]:
        """Topic partition to its end: the next offset that a consumer could be given (no open transaction's).

        Whatever Kafka had acknowledged when this was called lies below. While a transaction is open, it and all that
        was written after it lie above: no reader of committed records is given them before it ends.
        """
        return self._ask(OffsetSpec.latest(), deadline)[0]  # type: ignore[no-untyped-call]

    def ends(self, deadline: float = 5.0) -> tuple[dict[int, int], Seen]:
        """`latest`, and which topic that is of; asked at the same time, so it takes no longer.

        A topic that had been made anew before this was called is seen as another: its id, where Kafka has one.
        """
        return self._ask(OffsetSpec.latest(), deadline, identity=not self._is_embedded(deadline))  # type: ignore[no-untyped-call]

    def earliest(self, deadline: float = 5.0) -> dict[int, int]:
        """Topic partition to its start: the lowest offset that is still kept."""
        return self._ask(OffsetSpec.earliest(), deadline)[0]  # type: ignore[no-untyped-call]

    def topic_id(self, deadline: float = 5.0) -> str:
        """Kafka's id of the topic; "" where there is none, or it cannot be had now."""
        try:
            cluster = self._admin.list_topics(self._topic, timeout=deadline).cluster_id
            return id_of(self._admin, self._topic, cluster, deadline)
        except KafkaException as failure:
            log.info("topic %s: its id was not told: %s", self._topic, failure.args[0].str())
            return ""

    def _is_embedded(self, deadline: float) -> bool:
        """Asked once: the embedded broker cannot be asked for a topic's id."""
        if self._embedded is None:
            try:
                cluster = self._admin.list_topics(self._topic, timeout=deadline).cluster_id
            except KafkaException as failure:
                raise no_broker(self._bootstrap, failure.args[0]) from failure
            self._embedded = is_embedded(cluster)
        return self._embedded

    def _ask(self, which: OffsetSpec, deadline: float, *, identity: bool = False) -> tuple[dict[int, int], Seen]:
        until = time.monotonic() + deadline
        wanted = {TopicPartition(self._topic, number): which for number in range(self.partitions)}
        while True:
            left = max(until - time.monotonic(), 0.001)
            described = _described(self._admin, self._topic, left) if identity else None
            futures = self._admin.list_offsets(
                wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=left
            )
            try:
                offsets = {place.partition: int(future.result().offset) for place, future in futures.items()}
                seen = Seen("", self.partitions) if described is None else _seen(described, left)
            except KafkaException as failure:
                error: KafkaError = failure.args[0]
                if error.code() in _UNKNOWN:
                    raise TopicError(
                        f"topic {self._topic!r} at {self._bootstrap} is gone, or no longer has "
                        f"{self.partitions} topic partitions: restore it, or make a new collection"
                    ) from failure
            else:
                # A leader that did not answer in time is no error to librdkafka: it leaves the offset at "invalid".
                if min(offsets.values()) >= 0:
                    return offsets, seen
                error = KafkaError(KafkaError._TIMED_OUT)
            _pause_or_raise(error, self._bootstrap, self._topic, until)


def _admin(bootstrap: str, settings: Mapping[str, str] | None) -> AdminClient:
    try:
        return AdminClient({**COMMON_SETTINGS, **(settings or {}), "bootstrap.servers": bootstrap}, logger=KafkaLog())
    except KafkaException as failure:
        raise ConfigError(f"librdkafka refuses these Kafka settings: {failure.args[0].str()}") from failure


def _count(admin: AdminClient, bootstrap: str, topic: str, deadline: float, create: bool) -> int:
    until = time.monotonic() + deadline
    while True:
        try:
            # Never -1, which librdkafka reads as for ever.
            found = admin.list_topics(topic, timeout=max(until - time.monotonic(), 0.001)).topics[topic]
        except KafkaException as failure:
            error: KafkaError = failure.args[0]
        else:
            if found.error is None:
                return len(found.partitions)
            error = found.error
            if create and error.code() in _UNKNOWN and time.monotonic() + _PAUSE < until:
                time.sleep(_PAUSE)  # it is being created
                continue
        _pause_or_raise(error, bootstrap, topic, until)


def _pause_or_raise(error: KafkaError, bootstrap: str, topic: str, until: float) -> None:
    if error.code() in _UNKNOWN:
        raise TopicError(f"there is no topic {topic!r} at {bootstrap}: create it, or check its name")
    if error.code() == KafkaError.TOPIC_EXCEPTION:
        raise TopicError(f"{topic!r} cannot be the name of a topic: use letters, digits, '.', '_' and '-'")
    if not retriable(error) or time.monotonic() + _PAUSE >= until:
        raise no_broker(bootstrap, error)
    time.sleep(_PAUSE)
