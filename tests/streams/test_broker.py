"""The embedded broker against real clients: it must behave as Kafka does, and break when told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing

import psutil
import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition

from headrace.gpu.errors import BrokerError, ConfigError
from headrace.streams import mockcluster
from headrace.streams.broker import EmbeddedBroker
from headrace.streams.clients import COMMON_SETTINGS, KafkaLog
from headrace.streams.producer import RecordProducer
from headrace.streams.topics import Offsets, topic_partitions


def consumer(bootstrap):
    return closing(
        Consumer(
            {
                **COMMON_SETTINGS,
                "bootstrap.servers": bootstrap,
                "group.id": "test",
                "enable.auto.commit": "false",
                "auto.offset.reset": "error",
            },
            logger=KafkaLog(),
        )
    )


def read(bootstrap, topic, partition, start, count, seconds=10.0):
    """(offset, key, value, headers) of `count` records."""
    found = []
    with consumer(bootstrap) as reader:
        reader.assign([TopicPartition(topic, partition, start)])
        until = time.monotonic() + seconds
        while len(found) < count and time.monotonic() < until:
            message = reader.poll(0.1)
            if message is not None and message.error() is None:
                found.append((message.offset(), message.key(), message.value(), message.headers()))
    return found


def test_records_come_back_as_they_were(broker):
    broker.create_topic("round-trip", 1)
    with RecordProducer(broker.bootstrap, "round-trip") as producer:
        producer.send(b"a", b"1", [("h", b"x"), ("h", b"y"), ("none", None)])
        producer.send(b"a", None)
        producer.send(b"a", b"")
        producer.send(None, b"\x00" * 1000)
        assert producer.flush().offsets == {0: 4}
    assert read(broker.bootstrap, "round-trip", 0, 0, 4) == [
        (0, b"a", b"1", [("h", b"x"), ("h", b"y"), ("none", None)]),
        (1, b"a", None, None),
        (2, b"a", b"", None),
        (3, None, b"\x00" * 1000, None),
    ]


def test_committed_offsets_are_kept(broker, topic):
    with RecordProducer(broker.bootstrap, topic) as producer:
        producer.send(b"a", b"1")
        (partition, end), *_ = producer.flush().offsets.items()
    for _ in range(2):
        with consumer(broker.bootstrap) as reader:
            reader.commit(offsets=[TopicPartition(topic, partition, end)], asynchronous=False)
            assert reader.committed([TopicPartition(topic, partition)], 5.0)[0].offset == end


def test_listens_on_the_loopback_only(broker):
    for address in broker.bootstrap.split(","):
        assert address.startswith("127.0.0.1:")
    bound = {c.laddr.ip for c in psutil.Process(broker.pid).net_connections() if c.status == psutil.CONN_LISTEN}
    assert bound == {"127.0.0.1"}


def test_topics_at_the_start_and_several_brokers():
    with EmbeddedBroker(brokers=3, topics={"a": 2, "b": 16}) as cluster:
        assert len(cluster.bootstrap.split(",")) == 3
        assert topic_partitions(cluster.bootstrap, "a") == 2
        assert topic_partitions(cluster.bootstrap, "b") == 16
        cluster.create_topic("c")
        assert topic_partitions(cluster.bootstrap, "c") == 8
        assert repr(cluster) == f"EmbeddedBroker({cluster.bootstrap})"


def test_down_and_up():
    """Row 5 in small: what is sent meanwhile is delivered within a second of the broker's return, in order and once."""
    with EmbeddedBroker(topics={"docs": 1}) as cluster, RecordProducer(cluster.bootstrap, "docs") as producer:
        producer.send(b"a", b"before")
        producer.flush()
        cluster.down()
        for i in range(10):
            producer.send(b"a", b"%d" % i)
        with pytest.raises(BrokerError, match=r"10 of 10 records .* were not acknowledged .* they may still arrive"):
            producer.flush(0.5)
        with pytest.raises(BrokerError, match="no Kafka broker answers"):
            topic_partitions(cluster.bootstrap, "docs", 0.3)
        producer.send(b"a", b"last")
        cluster.up()
        started = time.monotonic()
        assert producer.flush().offsets == {0: 12}
        assert time.monotonic() - started < 5
        values = [value for _, _, value, _ in read(cluster.bootstrap, "docs", 0, 0, 12)]
        assert values == [b"before", *(b"%d" % i for i in range(10)), b"last"]


def test_a_hanging_broker():
    with EmbeddedBroker(topics={"docs": 1}) as cluster, RecordProducer(cluster.bootstrap, "docs") as producer:
        offsets = Offsets(cluster.bootstrap, "docs")
        os.kill(cluster.pid, signal.SIGSTOP)
        producer.send(b"a", b"1")
        with pytest.raises(BrokerError):
            offsets.latest(0.3)
        os.kill(cluster.pid, signal.SIGCONT)
        assert producer.flush().count == 1
        assert offsets.latest() == {0: 1}


def test_leaders_move_and_requests_fail_unseen():
    """Row 8: no error reaches the user, the order is kept, nothing is there twice."""
    with EmbeddedBroker(brokers=2, topics={"docs": 1}) as cluster:
        with RecordProducer(cluster.bootstrap, "docs") as producer:
            for i in range(60):
                if i == 20:
                    cluster.move_leader("docs", 0, 1)
                if i == 30:
                    cluster.fail_requests(
                        "produce", [KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.REQUEST_TIMED_OUT]
                    )
                if i == 40:
                    cluster.move_leader("docs", 0, 2)
                producer.send(b"a", b"%d" % i)
                if i % 7 == 0:
                    producer.flush(20.0)
            producer.flush(20.0)
        values = [int(value) for _, _, value, _ in read(cluster.bootstrap, "docs", 0, 0, 60)]
        assert values == list(range(60))
        assert Offsets(cluster.bootstrap, "docs").latest() == {0: 60}


def test_round_trip_time():
    with EmbeddedBroker(topics={"docs": 1}) as cluster, RecordProducer(cluster.bootstrap, "docs") as producer:
        cluster.rtt(1, 200)
        started = time.monotonic()
        producer.send(b"a", b"1")
        producer.flush()
        assert time.monotonic() - started > 0.15


def test_truncation_and_an_empty_return():
    """Row 7's two faults, as a client sees them."""
    with EmbeddedBroker(topics={"docs": 1}) as cluster, RecordProducer(cluster.bootstrap, "docs") as producer:
        for i in range(10):
            producer.send(b"a", b"%d" % i)
            producer.flush()
        offsets = Offsets(cluster.bootstrap, "docs")
        cluster.truncate("docs", 0, 6)
        assert offsets.earliest() == {0: 6}
        assert offsets.latest() == {0: 10}
        with consumer(cluster.bootstrap) as reader:
            reader.assign([TopicPartition("docs", 0, 2)])
            message = reader.poll(5.0)
            assert message.error().code() == KafkaError._AUTO_OFFSET_RESET
        cluster.delete_topic("docs")
        cluster.create_topic("docs", 1)
        assert offsets.latest() == {0: 0}


def test_retention_drops_the_oldest():
    """What the docstring says of 5 MiB; if a newer librdkafka keeps more, the docstring may say so."""
    with EmbeddedBroker(topics={"docs": 1}) as cluster:
        with RecordProducer(cluster.bootstrap, "docs", settings={"compression.type": "none"}) as producer:
            for _ in range(16):
                producer.send(b"a", b"x" * 500_000)
                producer.flush()
        offsets = Offsets(cluster.bootstrap, "docs")
        assert offsets.latest() == {0: 16}
        assert 4 <= offsets.earliest()[0] <= 7


def test_refusals_have_reasons():
    with EmbeddedBroker(topics={"docs": 1}) as cluster:
        for call, reason in [
            (lambda: cluster.create_topic("docs"), "already exists"),
            (lambda: cluster.down(7), "not available"),
            (lambda: cluster.truncate("docs", 0, 99), "out of range"),
            (lambda: cluster.delete_topic("nothing"), "Unknown topic"),
            (lambda: cluster.start(), "runs already"),
        ]:
            with pytest.raises(BrokerError, match=reason):
                call()
        with pytest.raises(ConfigError, match="at least 1"):
            cluster.create_topic("none", 0)
        with pytest.raises(ConfigError, match="choose from"):
            cluster.fail_requests("heartbeat", [1])
        cluster.create_topic("still-alive")
    for call in (lambda: cluster.bootstrap, lambda: cluster.pid, lambda: cluster.down()):
        with pytest.raises(BrokerError, match="not running"):
            call()
    with pytest.raises(ConfigError, match="0 brokers"):
        EmbeddedBroker(brokers=0)


def test_a_library_that_is_not_there(monkeypatch, tmp_path):
    class Spec:
        origin = str(tmp_path / "confluent_kafka" / "__init__.py")

    monkeypatch.setattr(mockcluster.importlib.util, "find_spec", lambda name: Spec)
    with pytest.raises(BrokerError, match=r"no librdkafka in .*confluent_kafka\.libs"):
        mockcluster.MockCluster(1)
    monkeypatch.setattr(mockcluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BrokerError, match="pip install confluent-kafka"):
        mockcluster.MockCluster(1)


def test_kill_and_start_again():
    cluster = EmbeddedBroker(topics={"docs": 1}).start()
    with RecordProducer(cluster.bootstrap, "docs") as producer:
        producer.send(b"a", b"1")
        producer.flush()
    process = psutil.Process(cluster.pid)
    cluster.kill()
    assert not process.is_running()
    cluster.kill()
    cluster.stop()
    with cluster:
        assert Offsets(cluster.bootstrap, "docs").latest() == {0: 0}


def test_a_process_that_died_by_itself():
    with EmbeddedBroker() as cluster:
        os.kill(cluster.pid, signal.SIGKILL)
        with pytest.raises(BrokerError, match="is gone"):
            cluster.create_topic("docs")


def test_an_interrupt_is_for_the_parent(broker):
    os.kill(broker.pid, signal.SIGINT)
    time.sleep(0.1)
    assert psutil.Process(broker.pid).status() != psutil.STATUS_ZOMBIE
    broker.create_topic("after-the-interrupt")


def test_it_does_not_outlive_its_parent():
    code = (
        "import os, signal; from headrace.streams.broker import EmbeddedBroker; b = EmbeddedBroker().start();"
        "print(b.pid, b.bootstrap, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    pid, bootstrap = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True).stdout.split()
    psutil.wait_procs([psutil.Process(int(pid))] if psutil.pid_exists(int(pid)) else [], timeout=5)
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    host, port = bootstrap.split(":")
    with socket.socket() as probe:
        assert probe.connect_ex((host, int(port))) != 0
