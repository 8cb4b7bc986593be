"""A refused record ends in the dead letters, with its bytes, its place and the reason."""

from __future__ import annotations

import time

import numpy as np
import pytest

from headrace.gpu.errors import BrokerError, ProduceError
from headrace.gpu.host import frames
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.dead_letters import DeadLetter, DeadLetters, read_dead_letters
from headrace.streams.records import RawBatch, RecordSpec, Refusal, decode, encode_json
from tests.streams.test_broker import read


def batch(topic, *records):
    count = len(records)
    return RawBatch(
        topic=topic,
        keys=[record[0] for record in records],
        values=[record[1] for record in records],
        headers=[record[2] if len(record) > 2 else None for record in records],
        topic_partitions=np.arange(count, dtype=np.int32) % 4,
        offsets=np.arange(7_000, 7_000 + count, dtype=np.int64),
        timestamps=np.arange(1_000, 1_000 + count, dtype=np.int64),
        ranges={},
        pulled=time.time(),
    )


@pytest.fixture
def letters(broker, topic):
    writer = DeadLetters(broker.bootstrap, topic)
    yield writer
    writer.close()


def test_from_refusal_to_letter(broker, topic, letters):
    """Row 10: the bad record alone is there, within a moment."""
    raw = batch(topic, encode_json("a", text="good"), (b"\xff", b"{}"), (b"b", b'{"text": 7}'), (None, None))
    spec = RecordSpec(dim=4, metric="cosine", ids="string", format="json", schema={}, encoder="e@1")
    decoded = decode(raw, spec, frames)
    assert decoded.ids == ["a"]
    assert letters.write(raw, decoded.refused).count == 3
    assert sorted(read_dead_letters(broker.bootstrap, topic), key=lambda letter: letter.offset) == [
        DeadLetter(decoded.refused[0].reason, 1, 7_001, b"\xff", b"{}", 2),
        DeadLetter("the text is 7: it must be a string", 2, 7_002, b"b", b'{"text": 7}', 11),
        DeadLetter("the key is missing: it must be the id", 3, 7_003, None, None, 0),
    ]


def test_headers(broker, topic):
    broker.create_topic(f"{topic}.dead-letters", 1)
    letters = DeadLetters(broker.bootstrap, topic)
    own = [("headrace-format", b"f32"), ("headrace-reason", b"forged"), ("none", None)]
    letters.write(batch(topic, (b"k", b"v", own)), [Refusal(0, "naïve \ud800")])
    [(_, key, value, headers)] = read(broker.bootstrap, f"{topic}.dead-letters", 0, 0, 1)
    assert (key, value) == (b"k", b"v")
    assert headers == [
        *own,
        ("headrace-reason", "naïve ?".encode()),
        ("headrace-topic", topic.encode()),
        ("headrace-topic-partition", b"0"),
        ("headrace-offset", b"7000"),
        ("headrace-timestamp", b"1000"),
        ("headrace-size", b"1"),
    ]
    assert read_dead_letters(broker.bootstrap, topic)[0].reason == "naïve ?"


def test_what_was_too_large_is_cut(broker, topic, letters):
    """Row 13: a dead letter is never itself too large to be written."""
    value = bytes(range(256)) * 47_000
    raw = batch(topic, (b"k" * 3_000_000, value, [("h", b"x" * 5_000_000)]))
    letters.write(raw, [Refusal(0, "too large")])
    [letter] = read_dead_letters(broker.bootstrap, topic)
    assert letter.size == len(value)
    assert letter.value == value[: 64 * 1024]
    assert letter.key == b"k" * 64 * 1024


def test_an_empty_value_is_not_a_missing_one(broker, topic, letters):
    letters.write(batch(topic, (b"a", b""), (b"b", None)), [Refusal(0, "x"), Refusal(1, "x")])
    assert {letter.key: letter.value for letter in read_dead_letters(broker.bootstrap, topic)} == {
        b"a": b"",
        b"b": None,
    }


def test_the_newest_come_last(broker, topic, letters):
    raw = batch(topic, *((b"%d" % i, b"x") for i in range(30)))
    for row in range(30):
        letters.write(raw, [Refusal(row, f"reason {row}")])
        time.sleep(0.002)  # Kafka's timestamps are milliseconds
    assert [letter.reason for letter in read_dead_letters(broker.bootstrap, topic, 5)] == [
        f"reason {row}" for row in range(25, 30)
    ]
    assert len(read_dead_letters(broker.bootstrap, topic)) == 30


def test_no_letters(broker, topic, letters):
    assert letters.write(batch(topic), []).count == 0
    assert read_dead_letters(broker.bootstrap, topic) == []
    assert read_dead_letters(broker.bootstrap, "no-such-topic") == []


def test_a_broker_that_is_away():
    with EmbeddedBroker(topics={"docs": 1}) as cluster:
        letters = DeadLetters(cluster.bootstrap, "docs")
        raw = batch("docs", (b"a", b"x"))
        letters.write(raw, [Refusal(0, "first")])
        cluster.down()
        with pytest.raises(ProduceError, match=r"'docs\.dead-letters' were not acknowledged"):
            letters.write(raw, [Refusal(0, "second")], deadline=0.3)
        with pytest.raises(BrokerError, match="no Kafka broker"):
            read_dead_letters(cluster.bootstrap, "docs", deadline=0.3)
        cluster.up()
        letters.close()
        assert [letter.reason for letter in read_dead_letters(cluster.bootstrap, "docs")] == ["first", "second"]
