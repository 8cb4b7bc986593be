"""What may happen to a topic while it is read, and what no fetch tells: it grows wider, goes, or is made anew."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient

from headrace.streams.clients import COMMON_SETTINGS, KafkaLog, is_embedded

__all__ = ["Seen", "TopicWatch", "changes"]

log = logging.getLogger("headrace.streams")

_ASK = 1.0
_ONCE_MORE = 0.2
"""Seconds until a topic that seems to be gone is looked for again: a broker that has just started may not know it."""

Seen = tuple[str, int]
"""A topic as it is: Kafka's id of it ("" where the broker has none, as the embedded one), its topic partitions."""


def changes(topic: str, partitions: int, before: Seen | None, now: Seen) -> list[str]:
    """What a person should know of a topic that was `before` and is `now`. Pure.

    Parameters
    ----------
    partitions : int
        Topic partitions that the collection was built on.
    before : Seen or None
        None at the first look.
    """
    found = []
    if before is not None and before[0] and now[0] and before[0] != now[0]:
        found.append(
            f"topic {topic!r} was deleted and made anew: what is indexed is of the old one, and its versions do not "
            "compare with the new one's; drop the collection and build it again"
        )
    if now[1] != partitions:
        found.append(
            f"topic {topic!r} has {now[1]} topic partitions and the collection was built on {partitions}: ids map to "
            "others now, and records of new topic partitions are not read; build a new collection from the topic"
        )
    return found


class TopicWatch:
    """Looks at a topic once in a while, from a thread of its own.

    Parameters
    ----------
    bootstrap, topic : str
    partitions : int
        Topic partitions that there should be.
    alarm : callable
        Called on the watch's thread with a sentence, once for each.
    made_anew : callable
        Called on the watch's thread, after the alarm, when the topic is another than before.
    settings : Mapping of str to str, optional
        Further librdkafka settings, for TLS and SASL.
    every : float
        Seconds between looks; one small request each.

    Notes
    -----
    What the first look finds is the topic that is read. A broker that is away is no news: the reader knows.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        partitions: int,
        alarm: Callable[[str], None],
        made_anew: Callable[[], None],
        *,
        settings: Mapping[str, str] | None = None,
        every: float = 1.0,
    ) -> None:
        self._config: dict[str, str | int | float | bool] = {**COMMON_SETTINGS, **(settings or {})}
        self._config["bootstrap.servers"] = bootstrap
        self._topic, self._partitions = topic, partitions
        self._alarm, self._made_anew = alarm, made_anew
        self._every = every
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"headrace-watch-{topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 2.0) -> None:
        """End the thread; waits at most `patience` seconds. Harmless when it was never started."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(patience)

    def _run(self) -> None:
        admin = AdminClient(self._config, logger=KafkaLog())
        before: Seen | None = None
        told: set[str] = set()
        pause = 0.0
        missing = False
        while not self._stopping.wait(pause):
            pause = self._every
            try:
                now = _look(admin, self._topic)
            except KafkaException as failure:
                log.debug("topic %s: cannot be looked at: %s", self._topic, failure.args[0].str())
                continue
            if now is None:
                sentences = [f"topic {self._topic!r} is gone: nothing more can be read; restore it"] if missing else []
                missing, pause = True, self._every if missing else _ONCE_MORE
            else:
                missing = False
                sentences = changes(self._topic, self._partitions, before, now)
            for sentence in sentences:
                if sentence not in told:
                    told.add(sentence)
                    self._alarm(sentence)
            if now is not None:
                if before is not None and before[0] and now[0] and before[0] != now[0]:
                    self._made_anew()
                before = now


def _look(admin: AdminClient, topic: str) -> Seen | None:
    """The topic as it is, or None if there is no such topic; raises KafkaException when nobody answers."""
    found = admin.list_topics(topic, timeout=_ASK)
    error = found.topics[topic].error
    if error is None and is_embedded(found.cluster_id):
        return "", len(found.topics[topic].partitions)  # it knows no topic ids, and cannot be asked for them
    if error is None:
        try:
            described = admin.describe_topics(TopicCollection([topic]), request_timeout=_ASK)[topic].result(2 * _ASK)
        except KafkaException as failure:
            error = failure.args[0]
        except TimeoutError as failure:
            raise KafkaException(KafkaError(KafkaError._TIMED_OUT)) from failure
        else:
            return str(described.topic_id), len(described.partitions)
    if error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
        return None
    raise KafkaException(error)
