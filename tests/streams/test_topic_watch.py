"""What is told of a topic that changes while it is read. Topic ids are Kafka's: see tests/kafka/test_log.py."""

from __future__ import annotations

import queue

import pytest

from headrace.streams.topic_watch import TopicWatch, changes

SOON = 20.0


@pytest.mark.parametrize("before", [None, ("a", 4), ("", 4)])
def test_nothing_is_told_of_a_topic_that_stays(before):
    assert changes("t", 4, before, ("a", 4)) == []


def test_what_is_told():
    (wider,) = changes("t", 4, ("a", 4), ("a", 6))
    assert "'t' has 6 topic partitions and the collection was built on 4" in wider
    (first_look,) = changes("t", 4, None, ("a", 6))
    assert first_look == wider
    (anew,) = changes("t", 4, ("a", 4), ("b", 4))
    assert "made anew" in anew
    assert len(changes("t", 4, ("a", 4), ("b", 6))) == 2


@pytest.fixture
def watching(broker, topic):
    """A running watch of a topic of 4 topic partitions, and the queue of its sentences."""
    told = queue.SimpleQueue()
    watch = TopicWatch(broker.bootstrap, topic, 4, told.put, lambda: told.put("made anew"), every=0.1)
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
