"""What is told of a topic that changes while it is read. Topic ids are Kafka's: see tests/kafka/test_log.py."""

from __future__ import annotations

import os
import queue
import signal
import time

import pytest

from headrace.streams.broker import EmbeddedBroker
from headrace.streams.link import Link
from headrace.streams.topic_identity import Seen, another, changes
from headrace.streams.topic_watch import TopicWatch

SOON = 20.0


@pytest.mark.parametrize("known", ["a", ""])
@pytest.mark.parametrize("found", ["a", ""])
def test_nothing_is_told_of_a_topic_that_stays(known, found):
    assert changes("t", 4, known, Seen(found, 4)) == []
    assert not another(known, found)


def test_what_is_told():
    (wider,) = changes("t", 4, "a", Seen("a", 6))
    assert "'t' has 6 topic partitions and the collection was built on 4" in wider
    assert changes("t", 4, "", Seen("a", 6)) == [wider]
    (anew,) = changes("t", 4, "a", Seen("b", 4))
    assert "made anew (id b, before a)" in anew
    assert changes("t", 4, "a", Seen("b", 6)) == [anew], "nothing is kept, so nothing maps otherwise"
    assert another("a", "b")


@pytest.fixture
def watching(broker, topic):
    """A running watch of a topic of 4 topic partitions, and the queue of its sentences."""
    told = queue.SimpleQueue()
    watch = TopicWatch(broker.bootstrap, topic, 4, told.put, lambda seen: told.put(f"found {seen}"), every=0.1)
    watch.start()
    yield told
    watch.stop()


def test_a_topic_that_goes_and_comes_back_wider(broker, topic, watching):
    with pytest.raises(queue.Empty):
        watching.get(timeout=0.5)
    broker.delete_topic(topic)
    assert "is gone" in watching.get(timeout=SOON)
    broker.create_topic(topic, 6)
    assert "has 6 topic partitions" in watching.get(timeout=SOON)
    with pytest.raises(queue.Empty):  # each thing once
        watching.get(timeout=0.5)


def test_a_broker_that_is_away_is_no_news(topic):
    told = queue.SimpleQueue()
    watch = TopicWatch("127.0.0.1:1", topic, 4, told.put, pytest.fail, every=0.05)
    watch.start()
    with pytest.raises(queue.Empty):
        told.get(timeout=1.0)
    watch.stop(5.0)
    assert not watch._thread.is_alive()


class Asked:
    """A watch that is told what it sees."""

    def __init__(self, *, topic_id):
        self.told, self.found = [], []
        self.watch = TopicWatch("127.0.0.1:1", "t", 4, self.told.append, self.found.append, topic_id=topic_id)

    def sees(self, topic_id, partitions=4):
        self.watch._judge(Seen(topic_id, partitions))


def test_a_topic_made_anew_is_told_once_and_found_until_that_is_known():
    asked = Asked(topic_id="a")
    asked.sees("a")
    assert (asked.told, asked.found) == ([], [])
    asked.sees("b")
    asked.sees("b")
    assert len(asked.told) == 1
    assert asked.found == [Seen("b", 4)] * 2
    asked.watch.topic_id = "b"
    asked.sees("b")
    assert len(asked.found) == 2


def test_an_id_that_was_not_known_is_no_alarm():
    asked = Asked(topic_id="")
    asked.sees("a")
    assert (asked.told, asked.found) == ([], [Seen("a", 4)])


@pytest.mark.parametrize(("seen", "said"), [("a", True), ("", True), ("b", False)])
def test_a_log_that_ends_too_early_is_told_unless_the_topic_is_another(seen, said):
    asked = Asked(topic_id="a")
    asked.watch.fell_short("it ends at 3")
    asked.sees(seen)
    assert ("it ends at 3" in asked.told) is said
    assert len(asked.told) == 1
    asked.sees(seen)
    assert len(asked.told) == 1


def reaches(condition):
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until, "not so"
        time.sleep(0.02)


def test_brokers_that_do_not_answer_are_away_until_they_do():
    with EmbeddedBroker(topics={"docs": 2}) as broker:
        link = Link(broker.bootstrap, "reader", "it waits")
        watch = TopicWatch(broker.bootstrap, "docs", 2, pytest.fail, pytest.fail, link=link, every=0.05, patience=0.3)
        watch.start()
        try:
            for begin, end in (
                (broker.down, broker.up),
                (lambda: os.kill(broker.pid, signal.SIGSTOP), lambda: os.kill(broker.pid, signal.SIGCONT)),
            ):
                assert link.away is None
                began = time.time()
                begin()
                reaches(lambda: link.away)
                assert link.away.broker == broker.bootstrap
                assert began <= link.away.since <= time.time()
                end()
                reaches(lambda: link.away is None)
        finally:
            watch.stop()


def test_one_leader_that_is_away_is_told():
    with EmbeddedBroker(brokers=3, topics={"docs": 3}) as brokers:
        for number in range(3):
            brokers.move_leader("docs", number, number + 1)
        link = Link(brokers.bootstrap, "reader", "it waits")
        watch = TopicWatch(brokers.bootstrap, "docs", 3, pytest.fail, pytest.fail, link=link, every=0.05, patience=0.3)
        brokers.down(2)
        watch.start()
        try:
            reaches(lambda: link.away)
            assert link.away.error == "topic partitions 1 have no leader"
            link.answered()  # another broker's records say nothing of this one
            assert link.away
            brokers.up(2)
            reaches(lambda: link.away is None)
        finally:
            watch.stop()
