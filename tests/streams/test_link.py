"""One line when a client's brokers are lost, one when they are back, and what is known in between."""

from __future__ import annotations

import logging
import queue
import time

import pytest

from headrace.streams.broker import EmbeddedBroker
from headrace.streams.clients import KafkaLog
from headrace.streams.link import Link
from headrace.streams.producer import RecordProducer
from headrace.streams.reader import Reader, ReaderSettings

SOON = 20.0


class KafkaErrorPlayed:
    def __init__(self, code, text):
        self._code, self._text = code, text

    def code(self):
        return self._code

    def str(self):
        return self._text

    def name(self):
        return "PLAYED"


ALL_DOWN = KafkaErrorPlayed(-187, "1/1 brokers are down")
REFUSED = "h:9092/1: Connect to ipv4#1.2.3.4:9092 failed: Connection refused (after 0ms in state CONNECT)"
LINE = f"[thrd:h:9092/1]: {REFUSED}"


@pytest.fixture
def link(caplog):
    caplog.set_level(logging.WARNING, logger="headrace.streams")
    return Link("h:9092", "reader", "it waits")


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def fail(link, text=LINE):
    link.log(logging.ERROR, "%s [%s] %s", "FAIL", "rdkafka#consumer-1", text)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_an_outage_is_told_once_and_its_end_too(link, caplog, order):
    for step in order:
        (lambda: fail(link), lambda: link._on_error(ALL_DOWN))[step]()
    for _ in range(5):
        fail(link)
        link._on_error(KafkaErrorPlayed(-195, REFUSED))
        fail(link, LINE.replace("CONNECT)", "CONNECT, 1 identical error(s) suppressed)"))
    (told,) = lines(caplog)
    why = "h:9092: Connect to ipv4#1.2.3.4:9092 failed: Connection refused"
    assert told == f"reader: Kafka is away: {why}; it waits"
    assert (link.away.broker, f"{link.away.broker}: {link.away.error}") == ("h:9092", why)
    link.answered()
    link.answered()
    assert link.away is None
    assert len(lines(caplog)) == 2
    assert lines(caplog)[1].startswith("reader: Kafka answers again after")


def test_a_coordinator_s_line_without_a_broker_gives_its_address(link):
    fail(link, LINE.replace("h:9092/1", "GroupCoordinator"))
    link._on_error(ALL_DOWN)
    assert link.away.broker == "1.2.3.4:9092"
    assert link.away.error.endswith("Connection refused")


def test_an_idle_connection_that_is_closed_is_no_outage(link, caplog):
    link.log(logging.INFO, "%s [%s] %s", "FAIL", "rdkafka#producer-1", "[thrd:x]: h:9092/1: Disconnected (after 9ms)")
    link._on_error(ALL_DOWN)
    assert link.away is None
    link.answered()
    fail(link)  # one broker of several, after all have been there
    assert link.away is None
    assert lines(caplog) == []


def test_the_newest_error_is_kept_and_the_beginning_too(link):
    fail(link)
    link._on_error(ALL_DOWN)
    began = link.away.since
    fail(link, "[thrd:h:9092/1]: h:9092/1: Failed to resolve 'h:9092': not known (after 1ms in state X)")
    assert link.away.error == "Failed to resolve 'h:9092': not known"
    assert link.away.since == began


def test_what_was_found_by_asking_ends_by_asking(link, caplog):
    link.lost("h:9093", "no leader")
    assert (link.away.broker, link.away.error) == ("h:9093", "no leader")
    link.answered()
    assert link.away, "another broker's records say nothing of this one"
    link.answered(time.monotonic() - 60.0)
    assert link.away, "asked before it was lost"
    link.answered(time.monotonic())
    assert link.away is None
    assert len(lines(caplog)) == 2


def test_other_lines_pass(link, caplog):
    link.log(logging.WARNING, "%s [%s] %s", "GETPID", "client", "retrying")
    link._on_error(KafkaErrorPlayed(29, "not allowed"))
    assert lines(caplog) == ["GETPID [client] retrying", "PLAYED [reader] not allowed"]
    assert isinstance(link, KafkaLog)


@pytest.fixture
def breakable():
    with EmbeddedBroker(topics={"docs": 2}) as broker:
        yield broker


def reaches(condition):
    until = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < until, "not so"
        time.sleep(0.02)


def test_a_reader_tells_of_its_brokers_absence_and_return(breakable, caplog):
    batches = queue.SimpleQueue()
    reader = Reader(breakable.bootstrap, "docs", "docs", batches.put, pytest.fail, ReaderSettings(batches_in_flight=9))
    reader.assign({0: 0, 1: 0})
    with caplog.at_level(logging.WARNING, logger="headrace.streams"):
        breakable.down()
        reader.start()  # it has never met its cluster
        try:
            reaches(lambda: reader.link.away)
            breakable.up()
            reaches(lambda: reader.link.away is None)
            breakable.down()
            reaches(lambda: reader.link.away)
            assert reader.link.away.broker == breakable.bootstrap
            breakable.up()
            with RecordProducer(breakable.bootstrap, "docs") as producer:
                producer.send_deletes(["a"])
                producer.flush()
            assert batches.get(timeout=SOON).keys == [b"a"]
            reaches(lambda: reader.link.away is None)
        finally:
            reader.stop()
    told = [line for line in lines(caplog) if line.startswith("reader of topic 'docs'")]
    assert ["away" in line for line in told] == [True, False, True, False]
    assert not any("rdkafka#" in line for line in lines(caplog)), "librdkafka's own lines say nothing more"


def test_a_producer_tells_of_its_brokers_absence_and_return(breakable, caplog):
    with (
        caplog.at_level(logging.WARNING, logger="headrace.streams"),
        RecordProducer(breakable.bootstrap, "docs") as producer,
    ):
        breakable.down()
        producer.send(b"a", b"x")
        reaches(lambda: producer._producer.poll(0.02) or producer._link.away)
        breakable.up()
        assert producer.flush(SOON).count == 1
    told = [line for line in lines(caplog) if line.startswith("producer of topic 'docs'")]
    assert len(told) == 2, told
    assert "records wait here" in told[0]
    assert "answers again" in told[1]
