"""The consumer that a `Reader` owns: its settings, and how it is made to suit the broker it meets."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from headrace.streams.clients import COMMON_SETTINGS, KafkaLog, is_embedded
from headrace.streams.link import Link

__all__ = ["ReaderSettings", "connect"]

log = logging.getLogger("headrace.streams")

_EMBEDDED_FETCH_WAIT = 0.003
_ASK = 0.5
"""Seconds that one question about the cluster may take before it is asked again."""


@dataclass(frozen=True, slots=True)
class ReaderSettings:
    """How a topic is read.

    Attributes
    ----------
    max_batch : int
        Records of one micro-batch.
    batches_in_flight, max_bytes_in_flight : int
        Past either, nothing is taken from the consumer; its own queue fills, fetching stops, and the lag grows in
        Kafka.
    batches_not_passed : int, optional
        The same for batches that `Reader.passed` has not been called for. With 1, records that come in while a slow
        step is at work make up one batch together, and that step is done once for all of them.
    fetch_wait : float
        Seconds for which a broker may hold back a fetch that has nothing yet. Apache Kafka answers as soon as a record
        comes, so this costs no latency and saves requests: an idle reader sends 10 in a second with 100 ms, and
        some 200 with 3 ms, which kept a broker 0.2 to 0.4 of a core busy. The embedded broker holds a fetch for all
        that time, and is asked to for 3 ms at most.
    poll, commit_interval : float
        Seconds.
    kafka : dict of str to str
        Further librdkafka settings.
    """

    max_batch: int = 256
    batches_in_flight: int = 1
    max_bytes_in_flight: int = 64 << 20
    batches_not_passed: int | None = None
    fetch_wait: float = 0.1
    poll: float = 0.1
    commit_interval: float = 0.2
    kafka: Mapping[str, str] = field(default_factory=dict)


def connect(
    bootstrap: str,
    topic: str,
    group: str,
    settings: ReaderSettings,
    on_commit: Callable[[KafkaError | None, list[TopicPartition]], None],
    stopping: threading.Event,
    link: Link | None = None,
) -> Consumer | None:
    """A consumer that has met its cluster; None if `stopping` is set before a broker answers.

    `on_commit` is called from its `poll` with what became of each asynchronous commit; `link` hears of outages.
    """
    consumer = _consumer(bootstrap, group, settings, settings.fetch_wait, on_commit, link)
    while not stopping.is_set():
        try:
            cluster = consumer.list_topics(topic, timeout=_ASK).cluster_id
        except KafkaException as failure:
            # librdkafka goes on connecting in the meantime; polled, it says to whom.
            consumer.poll(0.02)
            log.debug("topic %s: no broker answers yet: %s", topic, failure.args[0].str())
            continue
        if link is not None:
            consumer.poll(0)  # what is still to be said of an outage that is over
            link.answered()
        if is_embedded(cluster) and settings.fetch_wait > _EMBEDDED_FETCH_WAIT:
            consumer.close()
            consumer = _consumer(bootstrap, group, settings, _EMBEDDED_FETCH_WAIT, on_commit, link)
        return consumer
    consumer.close()
    return None


def _consumer(
    bootstrap: str,
    group: str,
    settings: ReaderSettings,
    fetch_wait: float,
    on_commit: Callable[..., None],
    link: Link | None,
) -> Consumer:
    return Consumer(
        {
            **COMMON_SETTINGS,
            "bootstrap.servers": bootstrap,
            "group.id": group,
            "enable.auto.commit": "false",
            "enable.auto.offset.store": "false",
            "on_commit": on_commit,
            "enable.partition.eof": "true",
            "auto.offset.reset": "error",
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": str(max(1, int(fetch_wait * 1000))),
            "fetch.queue.backoff.ms": "1",
            "fetch.error.backoff.ms": "50",
            "queued.max.messages.kbytes": "16384",
            "max.poll.interval.ms": "86400000",  # assigned, not subscribed: back-pressure may take any time
            **settings.kafka,
            **(link.settings if link is not None else {}),
        },
        logger=link or KafkaLog(),
    )
