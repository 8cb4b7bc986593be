"""What each level of consistency promises: what it waits for, what it does not, and what a wait in vain says."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

import headrace
from headrace.cluster.replica import Replica
from headrace.gpu.errors import ConfigError, ConsistencyTimeout, HeadraceError
from headrace.pipeline.client import Collection, Database
from headrace.streams.broker import EmbeddedBroker
from tests.history.checker import check_all
from tests.history.events import Produced
from tests.history.recorder import Recorder

DIM = 4


def vector(number: int) -> np.ndarray:
    return np.random.default_rng(number).normal(size=DIM).astype(np.float32)


def row(row_id: str, number: int = 0) -> dict[str, Any]:
    return {"id": row_id, "vector": vector(number), "n": number}


@pytest.fixture
def collection(db: Database, broker: EmbeddedBroker, topic: str) -> Iterator[Collection]:
    made = db.create_collection(topic, dim=DIM, replicas=2)
    made.ingest(broker.bootstrap)
    made.upsert([row("first", 1000)], wait="searchable")
    yield made
    db.drop_collection(topic)


@pytest.fixture
def other(db: Database, collection: Collection) -> Iterator[Collection]:
    """The same collection in a client of its own, which knows nothing of what the first one writes."""
    with headrace.connect(db.address) as elsewhere:
        yield elsewhere.collection(collection.name)


@contextmanager
def nothing_applied(monkeypatch: pytest.MonkeyPatch, name: str) -> Iterator[None]:
    """While this lasts, no copy of the collection takes anything in; the batches are tried again and again."""
    apply = Replica.apply

    def held(self: Replica, *args: Any) -> Any:
        if self.state.spec.name == name:
            raise HeadraceError("held up by a test")
        return apply(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Replica, "apply", held)
        yield


def promptly(read: Callable[[], Any], seconds: float = 3.0) -> Any:
    started = time.monotonic()
    answer = read()
    assert time.monotonic() - started < seconds, "it waited"
    return answer


def test_a_session_sees_its_own_writes(collection: Collection) -> None:
    for number in range(25):
        written = collection.upsert([row("mine", number)])
        (found,) = collection.get(["mine"])
        assert found is not None
        assert found.attributes["n"] == number
        ((_, topic_partition, offset),) = written.acks
        assert (found.topic_partition, found.offset) == (topic_partition, offset)
        hits = collection.search(vector(number), limit=1)
        assert (hits[0].id, hits[0].offset) == ("mine", offset)
        assert hits.offsets[topic_partition] > offset
        assert collection.count() == 2
        collection.delete(["mine"])
        assert collection.get(["mine"]) == [None]
        assert collection.count() == 1


def test_strong_sees_what_another_client_was_acknowledged(collection: Collection, other: Collection) -> None:
    for number in range(25):
        collection.upsert([row(f"r{number}", number)])
        (found,) = other.get([f"r{number}"], consistency="strong")
        assert found is not None
        assert found.attributes["n"] == number
        assert other.search(vector(number), limit=1, consistency="strong")[0].id == f"r{number}"
        assert other.count(consistency="strong") == number + 2


def test_a_wait_in_vain_says_what_was_missing(
    collection: Collection, other: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_applied(monkeypatch, collection.name):
        ((_, topic_partition, offset),) = collection.upsert([row("late", 2)]).acks
        missing = rf"had not applied everything .* 0\.\d+ s \(.*topic partition {topic_partition}: \d+ of {offset + 1}"
        for read in (
            lambda: collection.get(["late"], deadline=0.3),
            lambda: collection.search(vector(2), deadline=0.3),
            lambda: collection.count(deadline=0.3),
            lambda: other.get(["late"], consistency="strong", deadline=0.3),
            lambda: other.search(vector(2), consistency=headrace.bounded(0), deadline=0.3),
        ):
            started = time.monotonic()
            with pytest.raises(ConsistencyTimeout, match=missing):
                read()
            assert 0.25 < time.monotonic() - started < 2.0
        with pytest.raises(ConsistencyTimeout, match="topic partition"):
            collection.upsert([row("later", 3)], wait="searchable", deadline=0.5)
    assert all(collection.get(["late", "later"], deadline=20.0)), "what timed out must not be lost"


def test_eventual_does_not_wait(collection: Collection, monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_applied(monkeypatch, collection.name):
        collection.upsert([row("late", 2)])
        collection.delete(["first"])
        found = promptly(lambda: collection.get(["late", "first"], consistency="eventual"))
        assert found[0] is None
        assert found[1] is not None
        assert [hit.id for hit in promptly(lambda: collection.search(vector(2), consistency="eventual"))] == ["first"]
        assert promptly(lambda: collection.count(consistency="eventual")) == 1
    assert collection.get(["first"], deadline=20.0) == [None]


def test_a_session_does_not_wait_for_others(
    collection: Collection, other: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    with nothing_applied(monkeypatch, collection.name):
        collection.upsert([row("theirs", 2)])
        assert promptly(lambda: other.get(["theirs"])) == [None]


def test_bounded_waits_for_what_is_older(
    collection: Collection, other: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):  # each worker has looked at the ends of the log now
        other.get(["first"], consistency="strong")
        other.get(["first"], consistency="eventual")
    with nothing_applied(monkeypatch, collection.name):
        collection.upsert([row("late", 2)])
        assert promptly(lambda: other.get(["late"], consistency=headrace.bounded(600_000))) == [None]
        time.sleep(0.3)
        for consistency in (headrace.bounded(100), headrace.bounded(0)):
            with pytest.raises(ConsistencyTimeout):
                other.get(["late"], consistency=consistency, deadline=0.3)
    (found,) = other.get(["late"], consistency=headrace.bounded(0), deadline=20.0)
    assert found is not None


def test_levels_that_are_not_there(collection: Collection) -> None:
    for read in (collection.count, lambda **options: collection.get(["first"], **options)):
        with pytest.raises(ConfigError, match="'linearizable' is not known: use 'strong'"):
            read(consistency="linearizable")
    with pytest.raises(ConfigError, match="a staleness of -1 ms cannot be"):
        headrace.bounded(-1)


def test_every_level_keeps_its_promise_under_load(collection: Collection, other: Collection) -> None:
    recorder = Recorder(seed=3, command="pytest tests/pipeline/test_consistency.py")
    writer, reader = recorder.wrap(collection, "writer"), recorder.wrap(other, "reader")
    errors: list[Exception] = []

    def write() -> None:
        random = np.random.default_rng(3)
        try:
            for number in range(80):
                ids = [f"r{which}" for which in random.choice(40, 6, replace=False)]
                writer.upsert([row(row_id, number) for row_id in ids])
                writer.get(ids)
                writer.delete(ids[:1])
                writer.get(ids)
        except Exception as error:  # noqa: BLE001 - raised again in the thread of the test
            errors.append(error)

    thread = threading.Thread(target=write, name="writer")
    thread.start()
    levels = itertools.cycle(["strong", "eventual", "session", headrace.bounded(20)])
    while thread.is_alive():
        consistency = next(levels)
        reader.get([f"r{number}" for number in range(40)], consistency=consistency)
        reader.search(vector(1), limit=60, consistency=consistency, exhaustive=True)
    thread.join()
    assert not errors, errors
    reader.get(["first"], consistency="strong")
    recorder.note(Produced("first", *_place(collection, "first"), 0, sent_at=0.0, acked_at=0.0, client="before"))
    assert collection.verify().ok
    recorder.final_state(collection, replicas=2)
    report = check_all(recorder.history(), freshness_ms=None, required=("I1", "I2", "I3", "I5", "promise"))
    assert report.ok, str(report)
    assert report.judged["promise"] > 100


def _place(collection: Collection, row_id: str) -> tuple[int, int]:
    (found,) = collection.get([row_id])
    assert found is not None
    return found.topic_partition, found.offset
