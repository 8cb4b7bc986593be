"""One long-lived Kafka consumer and the one thread that owns it.

confluent-kafka's consumer is not to be shared between threads: a commit from a second one can block for ever. So
everything that concerns the consumer is an order put into a queue, and the thread carries orders out between two polls.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np
from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from headrace.streams.batches import RawBatch
from headrace.streams.commits import Commits
from headrace.streams.consumer import ReaderSettings, connect
from headrace.streams.link import Link

__all__ = ["Reader", "ReaderSettings"]

log = logging.getLogger("headrace.streams")

_LOOK_AT_ENDS = 0.1
_POLL_SLICE = 0.02
"""Seconds: a transaction's marker does not end a poll, and is seen after it; a read may be waiting for just that."""


class Reader:
    """Reads chosen topic partitions of one topic and hands over micro-batches as soon as there is something.

    Parameters
    ----------
    bootstrap, topic, group : str
    hand_over : callable
        Called on the reader's thread with each `RawBatch`; must return at once. `finished` is to be called for it
        later.
    alarm : callable
        Called on the reader's thread with a sentence when offsets were lost.
    settings : ReaderSettings, optional
    fell_short : callable, optional
        Called on the reader's thread, instead of `alarm`, with the sentence to be said of a log that ends below what
        had been read: somebody else may know better what has happened to the topic.

    Attributes
    ----------
    link : Link
        Whether its brokers are there.

    Notes
    -----
    `assign`, `commit`, `passed`, `finished`, `ends` and `stop` may be called from any thread.
    """

    def __init__(
        self,
        bootstrap: str,
        topic: str,
        group: str,
        hand_over: Callable[[RawBatch], None],
        alarm: Callable[[str], None],
        settings: ReaderSettings | None = None,
        fell_short: Callable[[str], None] | None = None,
    ) -> None:
        self.topic, self.settings = topic, settings or ReaderSettings()
        self.max_batch = self.settings.max_batch
        self._bootstrap, self._group = bootstrap, group
        self._hand_over, self._alarm, self._fell_short = hand_over, alarm, fell_short or alarm
        self.link = Link(
            bootstrap, f"reader of topic {topic!r}", "records wait there, and it reads on by itself when it is back"
        )
        self._orders: queue.SimpleQueue[Callable[[Consumer], None]] = queue.SimpleQueue()
        self._next: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._ends_at = 0.0
        self._gaps: dict[int, int] = {}
        self._has_gaps: set[int] = set()
        self._unplaced: set[int] = set()  # the consumer's position says nothing until something has come from there
        self._commits = Commits(topic, self.settings.commit_interval)
        self._room = threading.Condition()
        self._batches = self._bytes = 0
        self._not_passed: set[int] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"headrace-read-{topic}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 2.0) -> None:
        """Commit what is known to be done, close the consumer and end the thread.

        Waits at most `patience` seconds, for a broker that is away would be waited for until Kafka's own deadlines; a
        lost commit only means reading a little again.
        """
        self._stopping.set()
        with self._room:
            self._room.notify_all()
        if self._thread.is_alive():
            self._thread.join(patience)

    def assign(self, starts: Mapping[int, int]) -> None:
        """Read exactly these topic partitions; those that are read already go on where they are, others begin at the
        offset given.
        """

        def order(consumer: Consumer) -> None:
            self._next = {tp: self._next.get(tp, start) for tp, start in starts.items()}
            self._commits.assigned(self._next)
            self._assign_all(consumer)

        self._orders.put(order)

    def commit(self, offsets: Mapping[int, int]) -> None:
        """Tell Kafka that everything below these offsets is done; sent within `commit_interval`."""
        done = dict(offsets)
        self._orders.put(lambda _: self._commits.add(done))

    def passed(self, batch: RawBatch) -> None:
        """A batch is through the slow step (see `ReaderSettings.batches_not_passed`); again means nothing."""
        if self.settings.batches_not_passed is None:
            return  # nobody waits for it, and waking the thread would cost both their turn
        with self._room:
            self._not_passed.discard(id(batch))
            self._room.notify_all()

    def finished(self, batch: RawBatch) -> None:
        """A batch handed over has been dealt with: there is room for another."""
        with self._room:
            self._not_passed.discard(id(batch))
            self._batches -= 1
            self._bytes -= _size(batch)
            self._room.notify_all()

    def ends(self) -> dict[int, int]:
        """Topic partition to its end, as last seen by this consumer."""
        return dict(self._ends)

    # -- the thread ----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        consumer = None
        try:
            consumer = connect(
                self._bootstrap,
                self.topic,
                self._group,
                self.settings,
                self._commits.answered,
                self._stopping,
                self.link,
            )
            while consumer is not None and not self._stopping.is_set():
                self._carry_out_orders(consumer)
                self._commits.send_if_due(consumer)
                if not self._next:
                    self._stopping.wait(0.01)
                elif self._wait_for_room():
                    self._pull(consumer)
                else:  # the lag grows meanwhile, and is to be seen
                    self._look_at_ends(consumer, time.time())
        except Exception:
            log.exception("reading topic %s has stopped", self.topic)
            self._alarm(f"reading topic {self.topic!r} has stopped on an unexpected error; see the worker's log")
            raise
        finally:
            if consumer is not None:
                self._carry_out_orders(consumer)
                self._commits.send_last(consumer)
                consumer.close()

    def _carry_out_orders(self, consumer: Consumer) -> None:
        while not self._orders.empty():
            self._orders.get()(consumer)

    def _wait_for_room(self) -> bool:
        with self._room:
            if not self._full():
                return True
            self._room.wait(self.settings.poll)
            return not self._full()

    def _full(self) -> bool:
        settings = self.settings
        return (
            self._batches >= settings.batches_in_flight
            or self._bytes >= settings.max_bytes_in_flight
            or (settings.batches_not_passed is not None and len(self._not_passed) >= settings.batches_not_passed)
        )

    def _pull(self, consumer: Consumer) -> None:
        first = consumer.poll(min(self.settings.poll, _POLL_SLICE))
        messages: list[Message] = [] if first is None else [first]
        if first is not None and self.max_batch > 1:
            messages += consumer.consume(self.max_batch - 1, 0)
        pulled = time.time()
        usable: list[Message] = []
        ranges: dict[int, tuple[int, int]] = {}
        again: set[int] = set()
        for message in messages:
            error = message.error()
            if error is not None:
                self._on_error(consumer, message, error, ranges, again)
                continue
            tp, offset = _place(message)
            expected = self._next.get(tp)
            if expected is None or tp in again or offset < expected:
                continue  # no longer ours, or given before
            if offset > expected and self._ask_again(consumer, tp, expected, offset):
                again.add(tp)
                continue
            ranges[tp] = (ranges[tp][0] if tp in ranges else expected, offset + 1)
            self._next[tp] = offset + 1
            self._unplaced.discard(tp)
            usable.append(message)
        self._pass_markers(consumer, ranges, again)
        self._look_at_ends(consumer, pulled)
        if ranges:
            self.link.answered()
            self._give(usable, ranges, pulled)

    def _pass_markers(self, consumer: Consumer, ranges: dict[int, tuple[int, int]], again: set[int]) -> None:
        """Account for the markers of transactions, which take an offset each and are never handed over.

        The consumer's own position has passed them. The end of the log would tell of them too, but only with the next
        fetch, which a broker holds back while it has nothing.
        """
        places = [TopicPartition(self.topic, tp) for tp in self._next if tp not in self._unplaced and tp not in again]
        for place in consumer.position(places) if places else ():
            expected = self._next[place.partition]
            if place.error is None and place.offset > expected:
                self._account(place.partition, expected, place.offset, ranges)

    def _account(self, tp: int, expected: int, until: int, ranges: dict[int, tuple[int, int]]) -> None:
        """There is nothing for us from `expected` up to `until`."""
        ranges[tp] = (ranges[tp][0] if tp in ranges else expected, until)
        self._next[tp] = until

    def _look_at_ends(self, consumer: Consumer, now: float) -> None:
        """What the last fetch told of the log's ends; asks nobody."""
        if now - self._ends_at < _LOOK_AT_ENDS:
            return
        self._ends_at = now
        for tp in self._next:
            low, high = consumer.get_watermark_offsets(TopicPartition(self.topic, tp), cached=True)
            if high >= 0 and low <= high:
                self._ends[tp] = high

    def _give(self, messages: list[Message], ranges: dict[int, tuple[int, int]], pulled: float) -> None:
        count = len(messages)
        batch = RawBatch(
            topic=self.topic,
            keys=[message.key() for message in messages],
            values=[message.value() for message in messages],
            headers=[message.headers() for message in messages],  # type: ignore[misc]  # bytes, never text
            topic_partitions=np.fromiter((message.partition() for message in messages), np.int32, count),
            offsets=np.fromiter((message.offset() for message in messages), np.int64, count),
            timestamps=np.fromiter((message.timestamp()[1] for message in messages), np.int64, count),
            ranges=ranges,
            pulled=pulled,
        )
        with self._room:
            self._batches += 1
            self._bytes += _size(batch)
            self._not_passed.add(id(batch))
        self._hand_over(batch)

    def _ask_again(self, consumer: Consumer, tp: int, expected: int, offset: int) -> bool:
        """A gap: compaction and transactions leave some, a fault may too. Ask once; what the broker says twice is
        so.
        """
        if tp in self._has_gaps or self._gaps.get(tp) == expected:
            self._has_gaps.add(tp)
            return False
        log.info(
            "topic %s, topic partition %d: offsets %d to %d are not there; asking again",
            self.topic,
            tp,
            expected,
            offset - 1,
        )
        self._gaps[tp] = expected
        self._go_to(consumer, tp)
        return True

    def _on_error(
        self,
        consumer: Consumer,
        message: Message,
        error: KafkaError,
        ranges: dict[int, tuple[int, int]],
        again: set[int],
    ) -> None:
        (tp, offset), code = _place(message), error.code()
        if code == KafkaError._PARTITION_EOF:
            # What lies between the last record and the end (transaction markers, compacted records) is accounted for.
            expected = self._next.get(tp)
            if expected is not None and tp not in again and offset >= expected:
                self._unplaced.discard(tp)
                if offset > expected:
                    self._account(tp, expected, offset, ranges)
        elif code in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE) and tp in self._next:
            self._lost(consumer, tp, ranges)
        else:
            log.warning("topic %s: %s", self.topic, error.str())

    def _lost(self, consumer: Consumer, tp: int, ranges: dict[int, tuple[int, int]]) -> None:
        expected = self._next[tp]
        low, high = self._bounds(consumer, tp, (expected, expected))
        if expected < low:
            self._alarm(
                f"topic {self.topic!r}, topic partition {tp}: offsets {expected} to {low - 1} were deleted from the "
                "log before they were read; they are lost to the index unless it is rebuilt from another source"
            )
            ranges[tp] = (ranges[tp][0] if tp in ranges else expected, low)
        elif expected > high:
            self._fell_short(
                f"topic {self.topic!r}, topic partition {tp}: the log ends at offset {high}, below {expected} "
                "which had been read: the topic was made anew or has lost records; drop the collection and build it "
                "again"
            )
        if not low <= expected <= high:
            self._next[tp] = low
        self._go_to(consumer, tp)

    def _bounds(self, consumer: Consumer, tp: int, unknown: tuple[int, int]) -> tuple[int, int]:
        """Where the log begins and ends, asked of the broker; `unknown` if it does not say."""
        try:
            return consumer.get_watermark_offsets(TopicPartition(self.topic, tp), timeout=5.0, cached=False)
        except KafkaException as error:
            log.warning(
                "topic %s, topic partition %d: asking for its offsets failed: %s", self.topic, tp, error.args[0].str()
            )
            return unknown

    def _go_to(self, consumer: Consumer, tp: int) -> None:
        """Fetch on from where we are."""
        self._unplaced.add(tp)
        try:
            consumer.seek(TopicPartition(self.topic, tp, self._next[tp]))
        except KafkaException:
            # It is not being fetched: so Apache Kafka's "out of range" leaves it. Assigning begins everything anew.
            self._assign_all(consumer)

    def _assign_all(self, consumer: Consumer) -> None:
        self._unplaced = set(self._next)
        consumer.assign([TopicPartition(self.topic, tp, offset) for tp, offset in self._next.items()])


def _place(message: Message) -> tuple[int, int]:
    tp, offset = message.partition(), message.offset()
    assert tp is not None  # of a message that came from a consumer
    assert offset is not None
    return tp, offset


def _size(batch: RawBatch) -> int:
    return sum(len(value) for value in batch.values if value is not None)
