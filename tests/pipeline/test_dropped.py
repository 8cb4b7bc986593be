"""A handle on a collection that is gone says so, and writes nothing for it."""

from __future__ import annotations

import numpy as np
import pytest

import headrace
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


@pytest.mark.parametrize("limit", [0, -1, 2**40, 2.5, True, None])
def test_a_limit_that_cannot_be_is_refused(db: headrace.Database, limit: object) -> None:
    collection = db.create_collection("limits", dim=2)
    try:
        with pytest.raises(headrace.ConfigError, match="limit="):
            collection.search(np.ones(2), limit=limit)  # type: ignore[arg-type]
        assert list(collection.search(np.ones(2), limit=2**30)) == []
    finally:
        db.drop_collection("limits")
