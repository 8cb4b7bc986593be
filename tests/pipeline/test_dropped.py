"""A handle on a collection that is gone says so, and writes nothing for it."""

from __future__ import annotations

import contextlib
import gc
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import headrace
from headrace.gpu.table import Table
from headrace.streams.broker import EmbeddedBroker


def test_a_name_made_anew_is_another_collection(db: headrace.Database, broker: EmbeddedBroker) -> None:
    broker.create_topic("dropped-old", 4)
    broker.create_topic("dropped-new", 2)
    old = db.create_collection("dropped", dim=4)
    old.ingest(broker.bootstrap, "dropped-old")
    old.upsert({"id": "a", "vector": [1, 2, 3, 4]}, wait="searchable")
    with headrace.connect(db.address) as other:
        other.drop_collection("dropped")
        new = other.create_collection("dropped", dim=3)
        new.ingest(broker.bootstrap, "dropped-new")
        new.upsert({"id": "b", "vector": [1, 2, 3]}, wait="searchable")

    # The handle has a producer still: only a look at the state keeps it from writing to the old topic.
    old._async.look_again()  # what happens by itself after a second
    with pytest.raises(headrace.CollectionNotFound, match="dropped and another was made"):
        old.upsert({"id": "a", "vector": [1, 2, 3, 4]})
    opened = db.collection("dropped")
    assert opened.spec.dim == 3
    assert opened.count(consistency="strong") == 1
    db.drop_collection("dropped")


def test_a_dropped_collection_takes_no_writes(db: headrace.Database, topic: str, broker: EmbeddedBroker) -> None:
    collection = db.create_collection("gone", dim=2)
    collection.ingest(broker.bootstrap, topic)
    collection.upsert({"id": "a", "vector": [1, 2]}, wait="searchable")
    db.drop_collection("gone")
    with pytest.raises(headrace.CollectionNotFound):
        collection.upsert({"id": "b", "vector": [1, 2]})
    again = db.create_collection("gone", dim=2)
    again.ingest(broker.bootstrap, topic)
    assert again.count(consistency="strong") == 1
    assert again.get(["a", "b"])[1] is None
    db.drop_collection("gone")


def test_what_a_dropped_collection_held_is_free(db: headrace.Database, broker: EmbeddedBroker) -> None:
    def kept() -> int:
        gc.collect()
        return sum(isinstance(each, Table) for each in gc.get_objects())

    before = kept()
    for number in range(2):
        broker.create_topic(f"freed-{number}", 2)
        collection = db.create_collection(f"freed-{number}", dim=2)
        collection.ingest(broker.bootstrap)
        collection.upsert({"id": "a", "vector": [1, 2]}, wait="searchable")
        db.drop_collection(f"freed-{number}")
    until = time.monotonic() + 30
    while (now := kept()) > before:  # what is still under way ends first
        assert time.monotonic() < until, f"{now - before} stores of dropped collections are still there"
        time.sleep(0.05)


def test_a_collection_that_is_dropped_while_it_is_made(db: headrace.Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(2) as pool:
        for number in range(30):
            making = pool.submit(db.create_collection, f"brief-{number}", dim=2)
            dropping = pool.submit(drop_as_soon_as_it_is_there, db, f"brief-{number}")
            dropping.result(20)
            with contextlib.suppress(headrace.CollectionNotFound):
                making.result(20)
    assert not [name for name in db.collections() if name.startswith("brief-")]


def drop_as_soon_as_it_is_there(db: headrace.Database, name: str) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            db.drop_collection(name)
        except headrace.CollectionNotFound:
            continue
        return
    raise AssertionError(f"{name} never came")


@pytest.mark.parametrize("limit", [0, -1, 2**40, 2.5, True, None])
def test_a_limit_that_cannot_be_is_refused(db: headrace.Database, limit: object) -> None:
    collection = db.create_collection("limits", dim=2)
    try:
        with pytest.raises(headrace.ConfigError, match="limit="):
            collection.search(np.ones(2), limit=limit)  # type: ignore[arg-type]
        assert list(collection.search(np.ones(2), limit=2**30)) == []
    finally:
        db.drop_collection("limits")
