"""Answers of workers that are not equally far: where nothing near was on its way, none of them lacks a row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cluster.departed import Departed
from headrace.cluster.replica import Replica
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook
from headrace.cluster.wire import offsets_to_wire
from headrace.cluster.worker_reads import _Sought
from headrace.gpu.backend import resolve
from headrace.gpu.rows import Action, Batch, Left
from headrace.gpu.store import StoreSettings
from headrace.pipeline.answers import all_found, nothing_near

DIM, LIMIT = 2, 2
WORKERS = ("tcp://a:1", "tcp://b:2")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def batch_at(offset: int) -> Batch:
    return Batch(
        ["x"], np.zeros(1, np.int32), np.array([offset]), np.zeros(1, np.int64), np.ones(1, np.int32),
        np.array([Action.DROP], np.uint8), np.empty((0, DIM), np.float32),
    )  # fmt: skip


def left_at(*vector: float) -> tuple[Left, ...]:
    return (Left(np.array([0]), np.array([vector], np.float32)),)


QUERY = np.array([[1.0, 0.0]], np.float32)


class TestNear:
    @pytest.mark.parametrize(
        ("metric", "vector", "scores", "near"),
        [
            ("cosine", (0.6, 0.8), [0.9, 0.7], 0),
            ("cosine", (0.8, 0.6), [0.9, 0.7], 6),
            ("ip", (7.0, 0.0), [9.0, 7.0], 6),  # just as good: either may be shown
            ("l2", (1.0, 3.0), [0.5, 4.0], 0),
            ("l2", (1.0, 2.0), [0.5, 4.0], 6),
            ("cosine", (0.6, 0.8), [0.9], 6),  # fewer than were asked for: it would have been among them
        ],
    )
    def test_only_a_row_that_could_be_in_the_answer_counts(
        self, metric: str, vector: tuple[float, float], scores: list[float], near: int
    ) -> None:
        departed = Departed(metric)
        before = departed._known.until
        departed.note(batch_at(5), left_at(*vector), before, after := {0: 6})
        assert departed.near(after, QUERY, [scores], LIMIT, [[]])[0].get(0, 0) == near

    def test_what_is_not_known_counts(self) -> None:
        clock = Clock()
        departed = Departed("cosine", clock)
        first, far, scores = {0: 1}, left_at(-1.0, 0.0), [[0.9, 0.8]]
        departed.note(batch_at(5), far, first, then := {0: 6})  # something went before, of which it was not told
        assert departed.near(then, QUERY, scores, LIMIT, [[]]) == [{0: 1}]
        departed.note(batch_at(7), far, then, now := {0: 8})
        assert departed.near(now, QUERY, scores, LIMIT, [[]]) == [{0: 1}]
        assert departed.near({0: 9}, QUERY, scores, LIMIT, [[]]) == [{0: 9}], (
            "a view that is newer than what it was told"
        )
        unheard = {0: 9}
        departed.note(batch_at(8), far, unheard, now := {0: 9})
        assert departed.near(now, QUERY, scores, LIMIT, [[]]) == [{0: 9}], "one went between of which it was not told"
        clock.now = 0.06
        departed.note(batch_at(9), far, now, newest := {0: 10})
        clock.now = 0.11
        assert departed.near(newest, QUERY, scores, LIMIT, [[]]) == [{0: 9}], "too long ago"
        departed.note(batch_at(11), None, newest, last := {0: 12})
        assert departed.near(last, QUERY, scores, LIMIT, [[]]) == [{0: 12}]


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[tuple[str, int, tuple[float, float]]], tuple[int, int]]:
    numbers = st.sampled_from([-2.0, -1.0, 1.0, 2.0])
    record = st.tuples(st.sampled_from("aabcd"), st.integers(0, 1), st.tuples(numbers, numbers))
    records = draw(st.lists(record, min_size=8, max_size=20))
    # One id is always the best: it would be missed at once.
    records = [(row_id, cell, (9.0, 9.0) if row_id == "a" else vector) for row_id, cell, vector in records]
    behind = draw(st.integers(4, len(records) - 1))
    ahead = min(len(records), behind + draw(st.integers(1, 3)))
    return records, (behind, ahead) if draw(st.booleans()) else (ahead, behind)


@given(histories(), st.integers(1, 2))
@settings(max_examples=120, deadline=None)
def test_who_is_always_there_is_never_lacking(
    history: tuple[list[tuple[str, int, tuple[float, float]]], tuple[int, int]], limit: int
) -> None:
    """Two workers have a cell each and are not equally far; the rows of any moment between are a right answer."""
    records, reached = history
    state = CollectionState(
        CollectionSpec("docs", DIM, metric="ip"),
        first_codebook(DIM),
        epoch=1,
        members=dict.fromkeys(WORKERS, "active"),
        copies={0: WORKERS[:1], 1: WORKERS[1:]},
        serving={0: WORKERS[:1], 1: WORKERS[1:]},
        source=Source("localhost:9092", "docs", 1, "json", {0: 0}),
    )
    query = np.array([[1.0, 0.25]], np.float32)
    answers = []
    for mine, (worker, far) in enumerate(zip(WORKERS, reached, strict=True)):
        replica = Replica(state, worker, resolve("host"), StoreSettings())
        for offset, (row_id, cell, vector) in enumerate(records[:far]):
            holds = cell == mine
            batch = Batch(
                [row_id],
                np.zeros(1, np.int32),
                np.array([offset]),
                np.zeros(1, np.int64),
                np.array([cell], np.int32),
                np.array([Action.HOLD if holds else Action.DROP], np.uint8),
                np.array([vector] if holds else [], np.float32).reshape(-1, DIM),
            )
            replica.apply(batch, {0: (offset, offset + 1)}, {}, 1)
        (found,) = _Sought(replica.store, replica.departed, limit, None, None).search(query)
        answers.append(
            {
                "rows": [found.rows],
                "scores": [found.scores],
                "applied": offsets_to_wire(found.stamp),
                "near": offsets_to_wire(found.near),
            }
        )
    if not nothing_near(answers):
        return  # it is asked again
    shown = sorted((score for answer in answers for score in answer["scores"][0]), reverse=True)[:limit]
    told = {row[0] for answer in answers for row in answer["rows"][0]}
    moments = [
        {row_id: np.float32(vector) @ query[0] for row_id, _, vector in records[:end]}
        for end in range(min(reached), max(reached) + 1)
    ]
    for row_id in set.intersection(*(set(moment) for moment in moments)):
        least = min(moment[row_id] for moment in moments)
        assert row_id in told or (len(shown) == limit and least <= shown[-1]), f"{row_id} was there all the time"


def test_versions_that_differ_do_not_count_together() -> None:
    def answer(*rows: tuple[str, int], near: int = 0) -> dict[str, Any]:
        return {"rows": [[[row_id, 0, offset] for row_id, offset in rows]], "applied": [[0, 5]], "near": [[0, near]]}

    assert nothing_near([answer(("a", 1), ("b", 2)), answer(("b", 2), near=5)])
    assert not nothing_near([answer(("a", 1), ("b", 2)), answer(("b", 3))]), "one of the first answer's rows is gone"
    assert not nothing_near([answer(("a", 1)), answer(("b", 2), near=6)])


def test_rows_that_were_found_are_not_lacking() -> None:
    assert all_found([{"rows": [["a"], None]}, {"rows": [None, ["b"]]}])
    assert not all_found([{"rows": [["a"], None]}, {"rows": [["a"], None]}])


async def test_a_row_that_got_better_when_it_went_is_not_missed_for_a_newer_one() -> None:
    one, other = WORKERS
    state = CollectionState(
        CollectionSpec("docs", DIM, metric="ip"), first_codebook(DIM), epoch=1,
        members=dict.fromkeys(WORKERS, "active"), copies={0: (one,), 1: (other,)}, serving={0: (one,), 1: (other,)},
        source=Source("x:1", "docs", 1, "json", {0: 0}),
    )  # fmt: skip
    replicas = [Replica(state, worker, resolve("host"), StoreSettings()) for worker in WORKERS]

    def put(replica: Replica, offset: int, row_id: str, cell: int, score: float) -> None:
        hold = replica.address in state.copies[cell]
        batch = Batch(
            [row_id], np.zeros(1, np.int32), np.array([offset]), np.zeros(1, np.int64), np.array([cell], np.int32),
            np.array([Action.HOLD if hold else Action.DROP], np.uint8),
            np.array([(score, 0)] if hold else np.empty((0, DIM)), np.float32),
        )  # fmt: skip
        replica.apply(batch, {0: (offset, offset + 1)}, {}, 1)

    def answer(replica: Replica) -> dict[str, Any]:
        (found,) = _Sought(replica.store, replica.departed, 1, None, None).search(QUERY)
        offsets = {"applied": found.stamp, "near": found.near, "moved": found.moved}
        return {"rows": [found.rows], **{name: offsets_to_wire(each) for name, each in offsets.items()}}

    for replica in replicas:
        put(replica, 0, "best", 0, 0.5)
    put(replicas[0], 1, "best", 1, 0.9)  # to the other one, who has not heard of it
    put(replicas[0], 2, "new", 0, 0.6)  # better than the best row was, worse than it is
    assert not nothing_near([answer(replica) for replica in replicas])
