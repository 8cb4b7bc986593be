"""What may happen to a topic while it is read, and what no fetch tells: it grows wider, goes, or is made anew.

And whether it can be reached at all: a reader that is idle, or whose broker hangs, would not notice for a minute.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from confluent_kafka import KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec  # type: ignore[attr-defined]

from headrace.streams.clients import COMMON_SETTINGS, KafkaLog
from headrace.streams.link import Link
from headrace.streams.topic_identity import Seen, another, changes
from headrace.streams.topics import id_of

__all__ = ["TopicWatch"]

log = logging.getLogger("headrace.streams")

_ONCE_MORE = 0.2
"""Seconds until a topic that seems to be gone is looked for again: a broker that has just started may not know it."""
_IN_VAIN = 2
"""Looks in a row without an answer after which the brokers are held to be away: one may be this machine's own stall."""


class TopicWatch:
    """Looks at a topic once in a while, from a thread of its own.

    Parameters
    ----------
    bootstrap, topic : str
    partitions : int
        Topic partitions that there should be.
    alarm : callable
        Called on the watch's thread with a sentence, once for each.
    found : callable
        Called on the watch's thread with the topic as it is at each look that finds another id than `topic_id`, after
        the alarm.
    topic_id : str
        Of the topic that should be there; "" if that is not known. May be set later, from any thread.
    link : Link, optional
        Is told when no broker has answered, or not the leaders of all topic partitions, and when they do again.
    settings : Mapping of str to str, optional
        Further librdkafka settings, for TLS and SASL.
    every : float
        Seconds between looks; three small requests each.
    patience : float
        Seconds that a broker may take to answer one.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        partitions: int,
        alarm: Callable[[str], None],
        found: Callable[[Seen], None],
        *,
        topic_id: str = "",
        link: Link | None = None,
        settings: Mapping[str, str] | None = None,
        every: float = 1.0,
        patience: float = 1.0,
    ) -> None:
        self._config: dict[str, str | int | float | bool] = {**COMMON_SETTINGS, **(settings or {})}
        self._config["bootstrap.servers"] = self._bootstrap = bootstrap
        self._topic, self._partitions, self.topic_id = topic, partitions, topic_id
        self._alarm, self._found, self._link = alarm, found, link
        self._every, self._ask = every, patience
        self._told: set[str] = set()
        self._short: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"headrace-watch-{topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 2.0) -> None:
        """End the thread; waits at most `patience` seconds. Harmless when it was never started."""
        self._stopping.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def fell_short(self, sentence: str) -> None:
        """A log ends below what had been read: an alarm with this sentence, unless the topic is another, which says
        it all. From any thread.
        """
        self._short.put(sentence)
        self._wake.set()

    def _run(self) -> None:
        admin = AdminClient(self._config, logger=KafkaLog())
        pause = 0.0
        missing = False
        in_vain = 0
        while not self._stopping.is_set():
            self._wake.wait(pause)
            self._wake.clear()
            pause, began = self._every, time.monotonic()
            if self._stopping.is_set():
                return
            try:
                now = self._look(admin)
            except _Unanswered as failure:
                in_vain += 1
                log.debug("topic %s: cannot be looked at: %s: %s", self._topic, failure.broker, failure.why)
                if self._link is not None and in_vain >= _IN_VAIN:
                    self._link.lost(failure.broker, failure.why)
                continue
            in_vain = 0
            if self._link is not None:
                self._link.answered(began)
            if now is not None:
                missing = False
                self._judge(now)
            elif missing:
                self._tell(f"topic {self._topic!r} is gone: nothing more can be read; restore it")
            else:
                missing, pause = True, _ONCE_MORE

    def _judge(self, now: Seen) -> None:
        known = self.topic_id
        for sentence in changes(self._topic, self._partitions, known, now):
            self._tell(sentence)
        if now.topic_id and now.topic_id != known:
            self._found(now)
        while not self._short.empty():
            sentence = self._short.get()
            if not another(known, now.topic_id):
                self._tell(sentence)

    def _tell(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            self._alarm(sentence)

    def _look(self, admin: AdminClient) -> Seen | None:
        """The topic as it is, or None if there is no such topic; raises `_Unanswered`."""
        try:
            found = admin.list_topics(self._topic, timeout=self._ask)
            topic = found.topics[self._topic]
            if topic.error is None:
                topic_id = id_of(admin, self._topic, found.cluster_id, self._ask)
        except KafkaException as failure:
            error: KafkaError = failure.args[0]
            if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise _Unanswered(self._bootstrap, error.str()) from failure
        if topic.error is not None:
            if topic.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise _Unanswered(self._bootstrap, topic.error.str())
        leaders = {number: found.brokers.get(about.leader) for number, about in topic.partitions.items()}
        if orphans := [number for number, leader in leaders.items() if leader is None]:
            raise _Unanswered(self._bootstrap, f"topic partitions {_listed(orphans)} have no leader")
        if silent := self._silent(admin, leaders):
            who = sorted({f"{leader.host}:{leader.port}" for number in silent if (leader := leaders[number])})
            raise _Unanswered(
                ", ".join(who), f"no answer within {self._ask:g} s for topic partitions {_listed(silent)}"
            )
        return Seen(topic_id, len(leaders))

    def _silent(self, admin: AdminClient, topic_partitions: Iterable[int]) -> list[int]:
        """The topic partitions whose leaders do not say where their logs end."""
        asked = {TopicPartition(self._topic, number): OffsetSpec.latest() for number in topic_partitions}  # type: ignore[no-untyped-call]
        silent = []
        for place, answer in admin.list_offsets(asked, request_timeout=self._ask).items():
            try:
                if answer.result().offset < 0:  # how librdkafka tells that there was no answer
                    silent.append(place.partition)
            except KafkaException:
                silent.append(place.partition)
        return sorted(silent)


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))


class _Unanswered(Exception):
    """No answer to a look."""

    def __init__(self, broker: str, why: str) -> None:
        super().__init__(broker, why)
        self.broker, self.why = broker, why
