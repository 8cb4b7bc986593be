"""What happens to a log that is no mere queue: compacted, cut off at its start, widened, deleted and made anew."""

from __future__ import annotations

import itertools
import time

import pytest
from confluent_kafka import Consumer, TopicPartition

from headrace.pipeline.client import Collection, Database
from headrace.streams import topic_watch
from headrace.streams.producer import RecordProducer
from headrace.streams.topics import Offsets
from tests.kafka.conftest import Until
from tests.kafka.real_broker import RealBroker
from tests.kafka.writing import DIM, row, rows

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


def alarms(collection: Collection) -> str:
    return "\n".join(collection.status()["alarms"])


def offsets_held(kafka: RealBroker, topic: str, topic_partition: int) -> list[int]:
    """Every offset that the broker still gives out."""
    consumer = Consumer(
        {
            "bootstrap.servers": kafka.bootstrap,
            "group.id": "nobody",
            "enable.partition.eof": "true",
            "enable.auto.commit": "false",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.assign([TopicPartition(topic, topic_partition, 0)])
    found = []
    try:
        while (message := consumer.poll(10.0)) is not None and message.error() is None:
            found.append(message.offset())
        assert message is not None, "no end was reached"
    finally:
        consumer.close()
    return found


def test_gaps_that_compaction_leaves_are_no_loss(kafka: RealBroker, db: Database, name: str, until: Until) -> None:
    kafka.create_topic(
        name,
        1,
        cleanup_policy="compact",
        segment_ms=100,
        min_cleanable_dirty_ratio=0.01,
        min_compaction_lag_ms=0,
        delete_retention_ms=100,
    )
    with RecordProducer(kafka.bootstrap, name) as producer:
        for turn in range(4):
            # Each turn changes fewer ids, so that what is kept lies scattered.
            producer.send_json([row(number, turn=turn) for number in range(30) if number % 4 >= turn])
            producer.flush()
            time.sleep(0.2)
        producer.send_deletes([f"r{number}" for number in range(5)])
        producer.flush()
        time.sleep(0.2)
        producer.send_json([row(99, turn=9)])
        end = producer.flush().offsets[0]
    until("the log has been compacted", lambda: len(offsets_held(kafka, name, 0)) < 50)
    held = offsets_held(kafka, name, 0)
    assert held[-1] == end - 1, held
    assert any(later - offset > 1 for offset, later in itertools.pairwise(held)), f"no gap in {held}"
    collection = db.create_collection(name, dim=DIM, replicas=2)
    collection.ingest(kafka.bootstrap)
    found = collection.get([f"r{number}" for number in range(30)], consistency="strong", deadline=10.0)
    assert [number for number in range(30) if found[number] is None] == list(range(5))
    assert all(record.attributes["turn"] == record.attributes["n"] % 4 for record in found if record is not None)
    collection.upsert(rows(100), wait="searchable")
    status = collection.status()
    assert status["alarms"] == []
    assert status["state"] == "healthy"
    assert {worker["watermarks"][0] for worker in status["workers"]} == {end + 1}
    db.drop_collection(name)


def test_compaction_under_a_reader_is_no_loss(kafka: RealBroker, db: Database, name: str, until: Until) -> None:
    """Written on while the cleaner is at work, then an idle topic whose start is gone."""
    kafka.create_topic(
        name, 2, cleanup_policy="compact", segment_ms=100, min_cleanable_dirty_ratio=0.01, delete_retention_ms=100
    )
    collection = db.create_collection(name, dim=DIM, replicas=2)
    collection.ingest(kafka.bootstrap)
    for turn in range(20):
        collection.upsert([row(number, turn=turn) for number in range(20)], wait="searchable")
        time.sleep(0.1)
    found = collection.get([f"r{number}" for number in range(20)], consistency="strong")
    assert {record.attributes["turn"] for record in found} == {19}
    assert alarms(collection) == ""
    db.drop_collection(name)


@pytest.mark.parametrize("how", ["DeleteRecords", "retention"])
def test_records_deleted_before_they_were_read_are_an_alarm(
    kafka: RealBroker, db: Database, name: str, until: Until, how: str
) -> None:
    """The log is written and cut while the workers cannot reach the broker."""
    kafka.create_topic(name, 1, segment_ms=100)
    collection = db.create_collection(name, dim=DIM, replicas=2)
    collection.ingest(kafka.bootstrap)
    collection.upsert(rows(*range(20)), wait="searchable")
    with kafka.elsewhere() as address:
        offsets = Offsets(address, name)
        with RecordProducer(address, name) as producer:
            producer.send_json(rows(*range(100, 120)))
            producer.flush()
            time.sleep(0.2)
            producer.send_json(rows(*range(200, 210)))
            producer.flush()
        if how == "retention":
            kafka.configure_topic(name, "retention.ms", 100)
            until("retention has cut the log", lambda: offsets.earliest()[0] >= 40)
            kafka.configure_topic(name, "retention.ms", -1)
        else:
            kafka.truncate(name, 0, 45)
        low, end = offsets.earliest()[0], offsets.latest()[0]
        assert 40 <= low <= end == 50
    began = time.monotonic()
    until("an alarm", lambda: "were deleted from the log" in alarms(collection), 30.0)
    print(f"\nalarm {time.monotonic() - began:.2f} s after the broker's return")
    assert f"offsets 20 to {low - 1} were deleted" in alarms(collection)
    assert collection.status()["state"] == "degraded"
    # And it goes on: what is still there is read, strong reads return.
    assert collection.count(consistency="strong", deadline=10.0) == 20 + end - low
    collection.upsert(rows(300), wait="searchable")
    assert len(collection.status()["alarms"]) == 1
    db.drop_collection(name)


def test_topic_partitions_added_later_are_an_alarm(
    kafka: RealBroker, collection: Collection, name: str, until: Until
) -> None:
    collection.upsert(rows(*range(20)), wait="searchable")
    kafka.add_partitions(name, 3)
    until("an alarm", lambda: "topic partitions" in alarms(collection), 30.0)
    status = collection.status()
    assert status["state"] == "degraded"
    assert "3 topic partitions" in alarms(collection)
    assert len(status["alarms"]) == 1
    assert collection.count(consistency="strong") == 20


def ids(collection: Collection) -> set[str]:
    return {str(record.id) for record in collection.scan()}


def test_a_topic_made_anew_while_it_is_read_leaves_no_ghosts(
    kafka: RealBroker, collection: Collection, name: str, until: Until
) -> None:
    """Deleted under a writer; the new one has other records, and one of the same id that is older by its offset."""
    collection.upsert(rows(*range(60)), wait="searchable")
    kafka.delete_topic(name)
    until("an alarm that it is gone", lambda: "gone" in alarms(collection), 30.0)
    kafka.create_topic(name, 2)
    with RecordProducer(kafka.bootstrap, name) as producer:
        producer.send_json([row(number, new=True) for number in (3, *range(100, 110))])
        producer.flush()
    wanted = {"r3", *(f"r{number}" for number in range(100, 110))}
    until("only the new topic's records are there", lambda: ids(collection) == wanted)
    status = collection.status()
    assert status["state"] == "degraded"
    assert status["incarnation"] == 1
    assert sum("made anew" in alarm for alarm in status["alarms"]) == 1, status["alarms"]
    assert not any("below" in alarm for alarm in status["alarms"]), "one thing told twice, and the other time wrongly"
    # It goes on: what this client had written into the old one is waited for no more.
    assert collection.count(consistency="session", deadline=5.0) == len(wanted)
    collection.upsert(rows(200, 201), wait="searchable")
    collection.delete(["r3"], wait="searchable")
    assert collection.count(consistency="strong") == len(wanted) + 1
    (newer,) = collection.get(["r100"], consistency="strong")
    assert newer is not None
    assert newer.attributes == {"n": 100, "new": True}
    assert collection.verify().ok
    assert {tuple(sorted(worker["watermarks"])) for worker in collection.status()["workers"]} == {(0, 1)}


def test_a_strong_read_never_answers_from_a_topic_that_is_gone(
    kafka: RealBroker, collection: Collection, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new topic is shorter: by offsets alone, the old one's rows would do. Nobody else looks which topic it is."""
    monkeypatch.setattr(topic_watch, "id_of", lambda *_: "")
    collection.upsert(rows(*range(60)), wait="searchable")
    kafka.delete_topic(name)
    kafka.create_topic(name, 2)
    with RecordProducer(kafka.bootstrap, name) as producer:
        producer.send_json([row(3, new=True)])
        producer.flush()
    (newer, gone) = collection.get(["r3", "r4"], consistency="strong", deadline=30.0)
    assert newer is not None
    assert newer.attributes == {"n": 3, "new": True}
    assert gone is None
    assert ids(collection) == {"r3"}


def test_a_topic_made_anew_that_is_longer_already(
    kafka: RealBroker, collection: Collection, name: str, until: Until
) -> None:
    """Its offsets alone would not tell; nor does it matter how many topic partitions it has."""
    collection.upsert(rows(*range(4)), wait="searchable")
    with kafka.elsewhere() as address:
        kafka.delete_topic(name)
        kafka.create_topic(name, 3)
        with RecordProducer(address, name) as producer:
            producer.send_json(rows(*range(100, 200)))
            producer.flush()
        assert min(Offsets(address, name).latest().values()) > 4
    until("an alarm that it is another", lambda: "anew" in alarms(collection), 30.0)
    wanted = {f"r{number}" for number in range(100, 200)}
    until("its records are read, from their start, and no other is there", lambda: ids(collection) == wanted)
    assert collection.count(consistency="strong", deadline=5.0) == 100
    assert len(collection.status()["alarms"]) == 1
    assert collection.status()["state"] == "degraded"


def test_ingest_is_asked_for_again_when_the_topic_is_another(
    kafka: RealBroker, collection: Collection, name: str, until: Until
) -> None:
    collection.upsert(rows(*range(4)), wait="searchable")
    kafka.delete_topic(name)
    kafka.create_topic(name, 2)
    collection.ingest(kafka.bootstrap)
    collection.ingest(kafka.bootstrap)  # the same again
    collection.upsert(rows(7), wait="searchable", deadline=30.0)
    until("only that is there", lambda: ids(collection) == {"r7"})
    assert collection.status()["incarnation"] == 1
