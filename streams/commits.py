"""Telling Kafka how far a reader is: one commit at a time, so that its offsets only rise."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

__all__ = ["Commits"]

log = logging.getLogger("headrace.streams")


class Commits:
    """What is done and not yet committed. Belongs to the thread that owns the consumer.

    While one commit is under way no other is sent: after a broker's return librdkafka sends again what had not been
    answered, and a newer commit would be overtaken by an older one.

    Commits only say how far we are, to people who watch the lag; what must be read again is decided by the workers'
    watermarks.
    """

    def __init__(self, topic: str, interval: float) -> None:
        self._topic, self._interval = topic, interval
        self._ours: frozenset[int] = frozenset()
        self._waiting: dict[int, int] = {}
        self._under_way = False
        self._next_at = 0.0
        self._told: set[int] = set()

    def add(self, offsets: Mapping[int, int]) -> None:
        """Everything below these offsets is done."""
        self._waiting.update(offsets)

    def assigned(self, topic_partitions: Iterable[int]) -> None:
        """These are read here from now on: a commit that fails is sent again only for them, or it might overtake those
        of the reader that has the others now.
        """
        self._ours = frozenset(topic_partitions)

    def send_if_due(self, consumer: Consumer) -> None:
        """Send what there is, if the last one has been answered and long enough ago."""
        now = time.monotonic()
        if self._waiting and not self._under_way and now >= self._next_at:
            self._next_at = now + self._interval
            self._send(consumer, asynchronous=True)

    def send_last(self, consumer: Consumer) -> None:
        """Send what there is and wait for the answer: the consumer is about to be closed."""
        if self._waiting:
            self._send(consumer, asynchronous=False)

    def answered(self, error: KafkaError | None, places: list[TopicPartition]) -> None:
        """What has become of the commit under way: confluent-kafka's callback ``on_commit``."""
        self._under_way = False
        failed = [place for place in places if error is not None or place.error is not None]
        if not failed:
            self._told.clear()
            return
        self._tell(error or failed[0].error)
        for place in failed:
            if place.partition in self._ours:
                self._waiting.setdefault(place.partition, place.offset)  # unless there is a newer one

    def _send(self, consumer: Consumer, *, asynchronous: bool) -> None:
        places = [TopicPartition(self._topic, tp, offset) for tp, offset in self._waiting.items()]
        self._waiting.clear()
        try:
            if asynchronous:
                consumer.commit(offsets=places, asynchronous=True)
                self._under_way = True
            else:
                consumer.commit(offsets=places, asynchronous=False)
        except KafkaException as failure:
            self._tell(failure.args[0])

    def _tell(self, error: KafkaError | None) -> None:
        """Once for each kind of error, until a commit has gone through."""
        if error is not None and error.code() not in self._told:
            self._told.add(error.code())
            log.warning("committing offsets of topic %s failed: %s", self._topic, error.str())
