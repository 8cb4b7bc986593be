"""When the reader hands over the next micro-batch, and what is in it."""

from __future__ import annotations

import queue

import pytest

from headrace.streams.producer import RecordProducer
from headrace.streams.reader import Reader, ReaderSettings

SOON, NOT_NOW = 10.0, 0.5


@pytest.fixture
def reading(broker, topic):
    """A function that starts a reader of all of the topic; gives it and the queue of its batches."""
    readers = []

    def start(**settings):
        batches = queue.SimpleQueue()
        reader = Reader(broker.bootstrap, topic, topic, batches.put, pytest.fail, ReaderSettings(**settings))
        readers.append(reader)
        reader.assign(dict.fromkeys(range(4), 0))
        reader.start()
        return reader, batches

    yield start
    for reader in readers:
        reader.stop()


def write(broker, topic, *ids):
    with RecordProducer(broker.bootstrap, topic) as producer:
        producer.send_deletes(ids)
        assert producer.flush().count == len(ids)


def nothing(batches):
    with pytest.raises(queue.Empty):
        batches.get(timeout=NOT_NOW)


def test_what_comes_while_a_batch_has_not_passed_makes_up_one_batch(broker, topic, reading):
    reader, batches = reading(batches_in_flight=2, batches_not_passed=1)
    write(broker, topic, "a")
    first = batches.get(timeout=SOON)
    write(broker, topic, "b", "c", "d", "e")
    nothing(batches)
    reader.passed(first)
    second = batches.get(timeout=SOON)
    assert sorted(second.keys) == [b"b", b"c", b"d", b"e"]


def test_passed_is_not_finished(broker, topic, reading):
    reader, batches = reading(batches_in_flight=2, batches_not_passed=1)
    taken = []
    for id_ in ("a", "b"):
        write(broker, topic, id_)
        taken.append(batches.get(timeout=SOON))
        reader.passed(taken[-1])
        reader.passed(taken[-1])
    write(broker, topic, "c")
    nothing(batches)  # two are in flight, though both have passed
    reader.finished(taken[0])
    assert batches.get(timeout=SOON).keys == [b"c"]


def test_a_batch_that_is_finished_without_having_passed_makes_room(broker, topic, reading):
    reader, batches = reading(batches_in_flight=2, batches_not_passed=1)
    write(broker, topic, "a")
    reader.finished(batches.get(timeout=SOON))
    write(broker, topic, "b")
    assert batches.get(timeout=SOON).keys == [b"b"]


def test_a_log_that_begins_later_is_told_and_accounted_for(broker, topic):
    with RecordProducer(broker.bootstrap, topic) as producer:
        for number in range(10):
            producer.write([(b"same", b"%d" % number, None)])
        (partition,) = producer.write([(b"same", None, None)]).offsets
    broker.truncate(topic, partition, 6)
    told, batches = queue.SimpleQueue(), queue.SimpleQueue()
    reader = Reader(broker.bootstrap, topic, topic, batches.put, told.put, ReaderSettings(batches_in_flight=99))
    reader.assign({partition: 2})
    reader.start()
    try:
        assert "offsets 2 to 5 were deleted" in told.get(timeout=SOON)
        reached, values = 2, []
        while reached < 11:
            batch = batches.get(timeout=SOON)
            low, high = batch.ranges[partition]
            assert low == reached, "an offset that nobody accounts for"
            reached = high
            values += batch.values
        assert values == [b"6", b"7", b"8", b"9", None]
    finally:
        reader.stop()
    assert told.empty()
