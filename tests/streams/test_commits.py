"""One commit at a time: none overtakes another, none is forgotten."""

from __future__ import annotations

import pytest
from confluent_kafka import KafkaError, KafkaException, TopicPartition

from headrace.streams.commits import Commits


class Consumer:
    """Notes what is committed; a test answers for it."""

    def __init__(self):
        self.sent = []
        self.refusal = None

    def commit(self, offsets, asynchronous):
        if self.refusal is not None:
            raise KafkaException(self.refusal)
        self.sent.append({place.partition: place.offset for place in offsets})


@pytest.fixture
def consumer():
    return Consumer()


@pytest.fixture
def commits():
    commits = Commits("t", 0.0)
    commits.assigned([0, 1])
    return commits


def places(offsets):
    return [TopicPartition("t", tp, offset) for tp, offset in offsets.items()]


def test_nothing_is_sent_while_one_is_under_way(commits, consumer):
    commits.add({0: 5, 1: 5})
    commits.send_if_due(consumer)
    commits.add({0: 7})
    commits.send_if_due(consumer)
    assert consumer.sent == [{0: 5, 1: 5}]
    commits.answered(None, places({0: 5, 1: 5}))
    commits.send_if_due(consumer)
    commits.answered(None, places({0: 7}))
    commits.send_if_due(consumer)
    assert consumer.sent[1:] == [{0: 7}]


def test_what_failed_goes_again_unless_there_is_a_newer_one(commits, consumer):
    commits.add({0: 5, 1: 5})
    commits.send_if_due(consumer)
    commits.add({0: 7})
    commits.answered(KafkaError(KafkaError._TIMED_OUT), places({0: 5, 1: 5}))
    commits.send_if_due(consumer)
    assert consumer.sent[1:] == [{0: 7, 1: 5}]


def test_what_failed_does_not_go_again_for_topic_partitions_that_others_read(commits, consumer):
    commits.add({0: 5, 1: 5})
    commits.send_if_due(consumer)
    commits.assigned([1])
    commits.answered(KafkaError(KafkaError._TIMED_OUT), places({0: 5, 1: 5}))
    commits.send_last(consumer)
    commits.send_last(consumer)
    assert consumer.sent[1:] == [{1: 5}]


def test_no_more_often_than_it_should(consumer):
    commits = Commits("t", 3600.0)
    for offset in (5, 6):
        commits.add({0: offset})
        commits.send_if_due(consumer)
        commits.answered(None, places({0: offset}))
    assert consumer.sent == [{0: 5}]


def test_an_error_is_told_once(commits, consumer, caplog):
    consumer.refusal = KafkaError(KafkaError._STATE)
    for _ in range(3):
        commits.add({0: 5})
        commits.send_if_due(consumer)
    assert len(caplog.records) == 1
    assert "committing offsets of topic t failed" in caplog.text
