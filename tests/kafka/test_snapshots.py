"""Snapshots of what Apache Kafka has: behind a log that was truncated, and of a topic that was made anew."""

from __future__ import annotations

from pathlib import Path

import pytest

import headrace
from headrace.gpu.errors import TopicError
from headrace.pipeline.client import Collection, Database
from tests.kafka.conftest import Until
from tests.kafka.real_broker import RealBroker
from tests.kafka.writing import rows

pytestmark = [pytest.mark.kafka, pytest.mark.timeout(300)]


def test_the_log_goes_on_behind_a_snapshot(collection: Collection, db: Database, name: str, tmp_path: Path) -> None:
    collection.upsert(rows(*range(60)), wait="searchable")
    collection.snapshot(str(tmp_path))
    collection.upsert(rows(*range(50, 80)), wait="searchable")
    collection.delete(["r1", "r2"], wait="searchable")
    told = db.restore(str(tmp_path), f"{name}-again")
    again = db.collection(f"{name}-again")
    assert told.replayed == 32
    assert {row.id: row.offset for row in again.scan()} == {row.id: row.offset for row in collection.scan()}
    assert again.status()["alarms"] == []
    db.drop_collection(f"{name}-again")


def test_what_was_deleted_behind_a_snapshot_is_told(
    kafka: RealBroker, collection: Collection, db: Database, name: str, tmp_path: Path, until: Until
) -> None:
    collection.upsert(rows(*range(60)), wait="searchable")
    collection.snapshot(str(tmp_path))
    written = collection.upsert(rows(*range(100, 160)), wait="searchable")
    for topic_partition, end in written.offsets.items():
        kafka.truncate(name, topic_partition, end - 1)
    db.restore(str(tmp_path), f"{name}-again")
    again = db.collection(f"{name}-again")
    until("an alarm for each topic partition", lambda: len(again.status()["alarms"]) == 2)
    assert all("deleted from the log before they were read" in alarm for alarm in again.status()["alarms"])
    db.drop_collection(f"{name}-again")


def test_a_topic_made_anew_is_not_read_on(
    kafka: RealBroker, collection: Collection, db: Database, name: str, tmp_path: Path, until: Until
) -> None:
    collection.upsert(rows(*range(60)), wait="searchable")
    taken = collection.snapshot(str(tmp_path))
    kafka.delete_topic(name)
    kafka.create_topic(name, 2)
    until("the old rows are gone", lambda: not collection.count(consistency="eventual"))
    collection.upsert(rows(*range(100)), wait="searchable")  # more than the old one had
    with pytest.raises(TopicError, match="was made anew since the snapshot"):
        db.restore(str(tmp_path), f"{name}-again")
    told = db.restore(str(tmp_path), f"{name}-again", ingest=False)
    assert told.snapshot.name == taken.name
    again = db.collection(f"{name}-again")
    assert again.count() == 60
    assert all(again.get([row["id"] for row in rows(*range(60))]))
    assert len(again.search([1.0] * again.spec.dim, limit=100)) == 60
    with pytest.raises(headrace.CollectionError, match="restored without its topic"):
        db.collection(f"{name}-again").ingest(kafka.bootstrap, name)
    db.drop_collection(f"{name}-again")
