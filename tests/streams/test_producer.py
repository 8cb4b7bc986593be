"""Writing: what is acknowledged is there, and what cannot be is said at once."""

from __future__ import annotations

import json
import logging
import threading
import time

import numpy as np
import pytest

from headrace.gpu.errors import BrokerError, ConfigError, ProduceError, RecordError, TopicError
from headrace.gpu.host import frames
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.clients import KafkaLog
from headrace.streams.producer import PROFILES, Offsets, RecordProducer, topic_partitions
from headrace.streams.records import RecordSpec, decode
from tests.streams.test_broker import read
from tests.streams.test_records import batch

NOWHERE = "127.0.0.1:1"


@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_acknowledged_offsets_are_where_the_records_are(broker, topic, profile):
    with RecordProducer(broker.bootstrap, topic, profile=profile) as producer:
        producer.send_json({"id": f"id-{i}", "text": "t", "price": i} for i in range(100))
        producer.send_deletes(["id-3", "id-4"])
        delivered = producer.flush()
        assert producer.flush().count == 0
    assert delivered.count == len(delivered.acks) == 102
    assert delivered.offsets == Offsets(broker.bootstrap, topic).latest()
    log = {
        (partition, offset): (key, value)
        for partition, end in delivered.offsets.items()
        for offset, key, value, _ in read(broker.bootstrap, topic, partition, 0, end)
    }
    assert {(partition, offset): key for key, partition, offset in delivered.acks} == {
        place: key for place, (key, _) in log.items()
    }
    assert sorted(key for key, value in log.values() if value is None) == [b"id-3", b"id-4"]
    assert json.loads(dict(value for value in log.values() if value[1])[b"id-7"]) == {"text": "t", "price": 7}


def test_what_is_written_can_be_decoded(broker):
    broker.create_topic("decodes", 1)
    with RecordProducer(broker.bootstrap, "decodes") as producer:
        producer.send_json([{"id": "a", "vector": np.ones(4), "text": "words", "price": 2.5}])
        producer.flush()
    [(_, key, value, headers)] = read(broker.bootstrap, "decodes", 0, 0, 1)
    spec = RecordSpec(dim=4, metric="cosine", ids="string", format="json", schema={}, encoder=None)
    decoded = decode(batch((key, value, headers)), spec, frames)
    assert decoded.ids == ["a"]
    assert decoded.attributes == {"text": ["words"], "price": [2.5]}


def test_ids_go_where_java_puts_them(broker):
    """Java's producer takes murmur2 of the key, clears the sign bit, and divides by the number of topic partitions."""

    def murmur2(data):
        mask, multiplier = 0xFFFFFFFF, 0x5BD1E995
        hashed = (0x9747B28C ^ len(data)) & mask
        whole = len(data) // 4 * 4
        for at in range(0, whole, 4):
            word = int.from_bytes(data[at : at + 4], "little") * multiplier & mask
            hashed = (hashed * multiplier & mask) ^ ((word ^ word >> 24) * multiplier & mask)
        if rest := data[whole:]:
            hashed = (hashed ^ int.from_bytes(rest, "little")) * multiplier & mask
        hashed = (hashed ^ hashed >> 13) * multiplier & mask
        return hashed ^ hashed >> 15

    assert murmur2(b"21") == 0xFFFFFFFF & -973932308  # from the tests of Apache Kafka
    broker.create_topic("java", 7)
    with RecordProducer(broker.bootstrap, "java") as producer:
        for i in range(200):
            producer.send(b"key-%d" % i * (i % 4 + 1), None)
        for key, partition, _ in producer.flush().acks:
            assert partition == (murmur2(key) & 0x7FFFFFFF) % 7


def test_an_open_producer_sees_that_its_topic_was_made_anew_and_is_wider(broker):
    broker.create_topic("wider", 1)
    with RecordProducer(broker.bootstrap, "wider") as producer:
        assert {partition for _, partition, _ in written(producer, 0)} == {0}
        broker.delete_topic("wider")
        broker.create_topic("wider", 4)
        until = time.monotonic() + 60  # of its own accord, librdkafka would look again after 5 minutes
        while {partition for _, partition, _ in written(producer, 1)} != {0, 1, 2, 3}:
            assert time.monotonic() < until, "it still writes as if there were one topic partition"
            time.sleep(0.1)


def written(producer, number):
    return producer.write([(b"%d-%d" % (number, key), b"x", None) for key in range(40)], 30.0).acks


def test_threads_wait_for_their_own_records(broker, topic):
    delivered = {}

    def work(name):
        delivered[name] = [producer.write([(b"%d-%d" % (name, i), b"x", None)]) for i in range(40)]

    with RecordProducer(broker.bootstrap, topic) as producer:
        threads = [threading.Thread(target=work, args=(name,)) for name in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    acks = [ack for writes in delivered.values() for write in writes for ack in write.acks]
    assert {(key, 1) for key, _, _ in acks} == {(b"%d-%d" % (name, i), 1) for name in range(6) for i in range(40)}
    assert len({(partition, offset) for _, partition, offset in acks}) == 240
    for name, writes in delivered.items():
        assert [write.acks[0][0] for write in writes] == [b"%d-%d" % (name, i) for i in range(40)]


def test_sends_and_flushes_from_many_threads_lose_no_acknowledgement(broker, topic):
    flushed = []

    def send(name):
        for i in range(300):
            producer.send(b"%d-%d" % (name, i), b"x")

    def flush():
        flushed.extend(producer.flush() for _ in range(30))

    with RecordProducer(broker.bootstrap, topic) as producer:
        threads = [threading.Thread(target=send, args=(name,)) for name in range(3)]
        threads += [threading.Thread(target=flush) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        flushed.append(producer.flush())
    keys = [key for delivered in flushed for key, _, _ in delivered.acks]
    assert len(keys) == 900
    assert set(keys) == {b"%d-%d" % (name, i) for name in range(3) for i in range(300)}


def test_too_long_for_kafka(broker, topic):
    with RecordProducer(broker.bootstrap, topic, settings={"message.max.bytes": "2000"}) as producer:
        with pytest.raises(RecordError, match=r"b'long' has 2001 bytes, more than message.max.bytes of 2000"):
            producer.send(b"long", b"x" * 1990, [("seven77", None)])
        with pytest.raises(RecordError):
            producer.write([(b"fits", b"x", None), (b"long", b"x" * 2000, None)])
        producer.send(b"fits", b"x" * 1900)
        assert producer.flush().count == 1
    assert sum(Offsets(broker.bootstrap, topic).latest().values()) == 1


def test_a_bad_row_sends_nothing(broker, topic):
    with RecordProducer(broker.bootstrap, topic) as producer:
        for rows, reason in [
            ([{"id": "a", "text": "t"}, {"text": "t"}], "has no id"),
            ([{"id": "a", "text": "t"}, {"id": "b"}], "neither text nor vector"),
        ]:
            with pytest.raises(RecordError, match=reason):
                producer.send_json(rows)
        with pytest.raises(RecordError, match="cannot be a key"):
            producer.send_deletes(["a", 1.5])
        assert producer.flush().count == 0
    assert sum(Offsets(broker.bootstrap, topic).latest().values()) == 0


def test_unknown_topics_and_absent_brokers(broker):
    for make in (RecordProducer, Offsets, topic_partitions):
        with pytest.raises(TopicError, match=r"no topic 'no-such-topic' at 127\.0\.0\.1"):
            make(broker.bootstrap, "no-such-topic")
        with pytest.raises(BrokerError, match=f"no Kafka broker answers at {NOWHERE} .*: start one, or"):
            make(NOWHERE, "docs", deadline=0.5)
    with pytest.raises(TopicError, match="no topic"):  # and asking has not created it
        topic_partitions(broker.bootstrap, "no-such-topic")
    with RecordProducer(broker.bootstrap, "made-on-first-use", create_topic=True) as producer:
        assert producer.write([(b"a", b"x", None)]).count == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"profile": "quick"}, "unknown producer profile 'quick': use 'durable' or 'fast'"),
        ({"settings": {"partitioner": "random"}}, "partitioner 'random'"),
        ({"settings": {"no.such.setting": "1"}}, "no.such.setting"),
        ({"settings": {"linger.ms": "soon"}}, "Invalid value"),
        ({"settings": {"message.max.bytes": "huge"}}, "message.max.bytes"),
        ({"settings": {"acks": "0"}}, "acknowledges nothing"),
    ],
)
def test_settings_that_cannot_be(arguments, reason):
    with pytest.raises(ConfigError, match=reason):
        RecordProducer(NOWHERE, "docs", **arguments)


def test_a_broker_that_refuses_says_why():
    with EmbeddedBroker(topics={"docs": 1}) as cluster, RecordProducer(cluster.bootstrap, "docs") as producer:
        producer.send(b"a", b"1")
        producer.flush()
        cluster.fail_requests("produce", [10])  # MSG_SIZE_TOO_LARGE
        producer.send(b"b", b"2")
        with pytest.raises(
            ProduceError, match=r"1 of 1 records were refused, .*key b'b' .*'docs'.*max\.message\.bytes"
        ):
            producer.flush()


def test_a_queue_that_is_full(monkeypatch):
    monkeypatch.setattr("headrace.streams.producer._QUEUE_PATIENCE", 0.2)
    with EmbeddedBroker(topics={"docs": 1}) as cluster:
        producer = RecordProducer(cluster.bootstrap, "docs", settings={"queue.buffering.max.messages": "5"})
        cluster.down()
        for i in range(5):
            producer.send(b"%d" % i, b"x")
        with pytest.raises(ProduceError, match=r"key b'6' was not sent .*Queue full"):
            producer.send(b"6", b"x")
        cluster.up()
        assert producer.flush().count == 5
        producer.close()


def test_close_drops_what_nobody_takes(caplog):
    with EmbeddedBroker(topics={"docs": 1}) as cluster:
        # The lines that librdkafka logs wait in the queue that the records are in, and must not be counted with them.
        producer = RecordProducer(cluster.bootstrap, "docs", settings={"debug": "broker"})
        cluster.kill()
    producer.send(b"a", b"x")
    producer.send(b"b", b"x")
    with caplog.at_level(logging.WARNING, logger="headrace.streams"):
        producer.close(0.1)
    assert "2 records for topic docs were dropped" in caplog.text


def test_connection_noise_is_held_back(caplog, capfd):
    with EmbeddedBroker(topics={"docs": 1}) as cluster:
        producer = RecordProducer(cluster.bootstrap, "docs", settings={"reconnect.backoff.ms": "10"})
        with caplog.at_level(logging.DEBUG, logger="headrace.streams"):
            cluster.down()
            producer.send(b"a", b"x")
            with pytest.raises(ProduceError):
                producer.flush(0.7)
            cluster.up()
            producer.flush()
            producer.close()
    from_kafka = [record for record in caplog.records if "rdkafka#" in record.getMessage()]
    assert 1 <= len(from_kafka) <= 3
    assert max(record.levelno for record in from_kafka) <= logging.WARNING
    assert "rdkafka" not in capfd.readouterr().err


def test_log_lines_say_how_many_they_stand_for(caplog):
    noisy = KafkaLog(every=0.05)
    with caplog.at_level(logging.DEBUG, logger="headrace.streams"):
        for i in range(5):
            noisy.log(logging.ERROR, "%s [%s] %s", "FAIL", "client", f"text {i}")
        noisy.log(logging.INFO, "%s [%s] %s", "OTHER", "client", "text")
        threading.Event().wait(0.06)
        noisy.log(logging.ERROR, "%s [%s] %s", "FAIL", "client", "later")
    assert [record.getMessage() for record in caplog.records] == [
        "FAIL [client] text 0",
        "OTHER [client] text",
        "FAIL [client] later (and 4 like it)",
    ]
