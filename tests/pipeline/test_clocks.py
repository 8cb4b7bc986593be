"""Clocks that disagree: what is told, what is left out of freshness, and that order does not depend on them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import headrace
from headrace.pipeline.clocks import TOLERANCE, Early, ahead, apart, clock_notes
from headrace.streams.broker import EmbeddedBroker

HOUR = 3600.0
SOON = 30.0


@given(st.lists(st.floats(-1e7, 1e7), max_size=20))
def test_no_age_is_negative_and_each_is_accounted_for(ages: list[float]) -> None:
    early = Early()
    believed = early.sift(np.array(ages))
    assert (believed >= 0).all()
    assert len(believed) + early.count == len(ages)
    assert sorted(age for age in ages if age > 0) == sorted(age for age in believed.tolist() if age > 0)
    worst = -min(ages, default=0.0)
    assert early.skew == (worst if worst > 1e3 * TOLERANCE else 0.0)


def test_the_largest_of_late_is_kept() -> None:
    early = Early()
    for age in (-5000.0, -9000.0, -2000.0, 30.0):
        early.sift(np.array([age]))
    assert (early.count, early.skew) == (3, 9000.0)


@given(st.floats(-1e5, 1e5), st.floats(0, 10), st.floats(0, 10))
def test_ahead_is_never_more_than_it_is(skew: float, there: float, back: float) -> None:
    asked, answered = 1000.0, 1000.0 + there + back
    told = ahead(asked + there + skew, asked, answered)
    assert abs(told) <= abs(skew) + 1e-6
    assert told * skew >= 0
    assert abs(told) >= abs(skew) - (there + back) - 1e-6


@pytest.mark.parametrize(
    ("clocks", "off"),
    [
        ({}, {}),
        ({"a": 0.3, "b": -0.3}, {}),
        ({"a": HOUR}, {"a": HOUR}),
        ({"a": HOUR, "b": 0.0}, {"a": HOUR}),
        ({"a": -HOUR, "b": 0.1, "c": 0.0}, {"a": -HOUR}),
        ({"a": HOUR, "b": HOUR, "c": HOUR}, {"": -HOUR}),
    ],
)
def test_who_is_off(clocks: dict[str, float], off: dict[str, float]) -> None:
    assert apart(clocks) == pytest.approx(off, abs=0.11)
    notes = clock_notes(clocks, {})
    assert len(notes) == len(off)
    for (whose, by), note in zip(sorted(off.items()), notes, strict=True):
        assert (whose or "this client") in note
        assert f"3600.0 s {'ahead of' if by > 0 else 'behind'}" in note or "3599.9" in note


def test_records_that_are_early_are_told_where_the_clock_is_not_known_to_be_off() -> None:
    assert clock_notes({"a": -HOUR}, {"a": 5e6}) == clock_notes({"a": -HOUR}, {})
    (note,) = clock_notes({"a": 0.0}, {"a": 7000.0, "b": 0.0})
    assert "by the clock of a" in note
    assert "7.0 s before they were written" in note


@contextmanager
def clock_off(db: headrace.Database, worker: str, seconds: float) -> Iterator[None]:
    """One worker measures with a clock that is off."""
    (node,) = (w.plugins["headrace"] for w in db.dask.cluster.workers.values() if w.address == worker)
    node.clock = lambda: time.time() + seconds
    try:
        yield
    finally:
        del node.clock


@pytest.mark.parametrize("off", [HOUR, -HOUR], ids=["ahead", "behind"])
def test_a_clock_an_hour_off_on_one_worker(
    db: headrace.Database, broker: EmbeddedBroker, topic: str, off: float
) -> None:
    """RELIABILITY row 20. Both workers read topic partitions, so that half of the ages are wrong."""
    collection = db.create_collection(topic, dim=2, replicas=2)
    collection.ingest(broker.bootstrap)
    worker = collection.status()["workers"][0]["address"]
    rows = [{"id": f"r{n}", "vector": [1.0, float(n)], "turn": 0} for n in range(40)]
    try:
        with clock_off(db, worker, off):
            for turn in range(3):
                collection.upsert([{**row, "turn": turn} for row in rows], wait="searchable")
            found = collection.get([row["id"] for row in rows], consistency="strong")
            assert {row.attributes["turn"] for row in found if row} == {2}, "order goes by a clock"
            assert len([row for row in found if row]) == 40
            assert collection.verify().ok
            end = time.monotonic() + SOON
            while (status := collection.status())["ingest"]["records"] < 120:  # counted a moment after it is searchable
                assert time.monotonic() < end, status["ingest"]
                time.sleep(0.02)
            assert status["state"] == "degraded"
            (note,) = status["notes"]
            assert note.startswith(f"the clock of {worker} is 3")
            assert ("ahead of" if off > 0 else "behind") in note
            freshness = status["ingest"]["freshness_ms"]
            assert freshness["clock_skew"] == pytest.approx(1e3 * HOUR, rel=0.05)
            if off < 0:
                assert 0 < freshness["early"] < 120
                assert freshness["count"] + freshness["early"] == 120, "an age that is a lie was counted"
            else:
                assert (freshness["early"], freshness["count"]) == (0, 120)
        # What it told of records that are early is shown for a minute more.
        assert not any(note.startswith("the clock of") for note in collection.status()["notes"])
    finally:
        db.drop_collection(topic)
