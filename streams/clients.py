"""What all Kafka clients of this project have in common: settings that recover quickly, and logs that do not flood."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from types import MappingProxyType

from confluent_kafka import KafkaError

from headrace.gpu.errors import BrokerError

__all__ = ["COMMON_SETTINGS", "KafkaLog", "is_embedded", "no_broker", "retriable"]

log = logging.getLogger("headrace.streams")

COMMON_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "socket.nagle.disable": "true",
        "reconnect.backoff.max.ms": "200",
        # By default librdkafka starts from nothing when no broker answers, and asks for leaders again once a second:
        # measured, it needs 1 to 2 s after the broker is back. With "none" it keeps what it knows, and needs 0.2 s.
        "metadata.recovery.strategy": "none",
        # A name with a typing mistake must not become a topic.
        "allow.auto.create.topics": "false",
    }
)

_PASSING = frozenset(
    {
        KafkaError._ALL_BROKERS_DOWN,
        KafkaError._NOENT,  # "no leaders found", of AdminClient.list_offsets
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
        KafkaError._WAIT_CACHE,
        KafkaError.BROKER_NOT_AVAILABLE,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.NETWORK_EXCEPTION,
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.REQUEST_TIMED_OUT,
    }
)


def retriable(error: KafkaError) -> bool:
    """True if the same question may be answered a moment later: a broker is away, or a leader is moving."""
    return error.code() in _PASSING or error.retriable()


def is_embedded(cluster_id: str | None) -> bool:
    """True for the id of an `EmbeddedBroker`'s cluster, which librdkafka makes up of this word and a number."""
    return (cluster_id or "").startswith("mockCluster")


def no_broker(bootstrap: str, error: KafkaError) -> BrokerError:
    """The error for a Kafka that does not answer."""
    return BrokerError(
        f"no Kafka broker answers at {bootstrap} ({error.str()}): start one, or check the address and the network"
    )


class KafkaLog:
    """librdkafka's log lines for the logger ``headrace.streams``: what confluent-kafka takes as `logger`.

    A broker that is away makes a line at every attempt to connect. Of each kind one line passes in `every` seconds, and
    says how many it stands for; none is an error, because librdkafka tries again by itself. Thread-safe.
    """

    def __init__(self, every: float = 10.0) -> None:
        self._every = every
        self._lock = threading.Lock()
        self._quiet_until: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def log(self, level: int, form: str, *arguments: object) -> None:
        """Called by confluent-kafka with ``(level, "%s [%s] %s", kind, client, text)``."""
        kind = str(arguments[0]) if arguments else form
        now = time.monotonic()
        with self._lock:
            if now < self._quiet_until.get(kind, 0.0):
                self._held_back[kind] = self._held_back.get(kind, 0) + 1
                return
            self._quiet_until[kind] = now + self._every
            more = self._held_back.pop(kind, 0)
        log.log(min(level, logging.WARNING), form + (f" (and {more} like it)" if more else ""), *arguments)
