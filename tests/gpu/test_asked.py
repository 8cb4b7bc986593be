"""Queries that were asked count when an index is calibrated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from headrace.gpu.asked import Asked
from headrace.gpu.backend import resolve
from headrace.gpu.calibrate import calibrate
from headrace.gpu.index_spec import IndexSpec, build_params
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import batch_of
from tests.gpu.searches import clustered, random_rows, true_scores

HOST = resolve("host")


def test_nothing_was_asked() -> None:
    assert Asked().latest() is None


def test_the_latest_are_kept_each_once() -> None:
    asked, rows = Asked(), random_rows(300, 4)
    for row in rows:
        asked.note(row[None])
    assert {tuple(row) for row in asked.latest()} == {tuple(row) for row in rows[-128:]}
    for _ in range(200):
        asked.note(rows[:1])
    assert asked.latest().tolist() == rows[:1].tolist()


def test_of_a_batch_a_few_are_kept_and_others_of_the_next() -> None:
    asked, rows = Asked(), random_rows(200, 4)
    asked.note(rows)
    first = {tuple(row) for row in asked.latest()}
    assert len(first) == 16
    for _ in range(5):
        asked.note(rows)
    assert len({tuple(row) for row in asked.latest()} - first) >= 64
    asked.note(rows[:0])


def test_what_was_noted_does_not_change_with_the_callers_array() -> None:
    asked, rows = Asked(), np.ones((1, 3), np.float32)
    asked.note(rows)
    rows[:] = 7
    assert asked.latest().tolist() == [[1, 1, 1]]


def unlike(count: int) -> np.ndarray:
    return random_rows(count, 32, "cosine", seed=11)


def recall(found: np.ndarray, rows: np.ndarray, queries: np.ndarray) -> float:
    best = np.argsort(-true_scores(rows, queries, "cosine"), axis=1)[:, : found.shape[1]]
    return float(np.mean([len(set(a) & set(b)) for a, b in zip(found.tolist(), best.tolist(), strict=True)])) / 10


def test_queries_that_are_unlike_the_rows_find_what_they_were_promised() -> None:
    rows, _ = clustered(8000, 32, "cosine")
    kind = HOST.kinds["graph"]
    index = kind.build(rows, "cosine", build_params(IndexSpec("graph"), len(rows), 32))
    before = calibrate(HOST, kind, index, rows, "cosine")
    after = calibrate(HOST, kind, index, rows, "cosine", asked=unlike(100))
    few = calibrate(HOST, kind, index, rows, "cosine", asked=unlike(31))
    new = random_rows(300, 32, "cosine", seed=12)

    def found(effort: int) -> np.ndarray:
        return np.concatenate([kind.search(index, None, query[None], 10, effort=effort)[1] for query in new])

    assert few == before
    assert recall(found(before.effort(0.95)), rows, new) < 0.85
    assert recall(found(after.effort(0.95)), rows, new) > 0.9


@pytest.mark.parametrize("count", [1, 3, 9, 20])
@pytest.mark.parametrize("kind", ["graph", "ivf_pq"])
def test_more_queries_were_asked_than_there_are_rows(count: int, kind: str) -> None:
    rows, built = random_rows(count, 32, "cosine"), HOST.kinds[kind]
    index = built.build(rows, "cosine", build_params(IndexSpec(kind), count, 32))
    assert calibrate(HOST, built, index, rows, "cosine", asked=unlike(100)).best == 1


@pytest.mark.parametrize("asks", [False, True])
def test_a_store_calibrates_with_what_it_was_asked(asks: bool) -> None:
    store = Store(HOST, 32, "cosine", StoreSettings(seal_rows=4096), index=IndexSpec("graph"))
    rows, _ = clustered(4096, 32, "cosine")
    made = batch_of([{"id": str(n), "offset": n} for n in range(len(rows))], 32)
    store.apply(replace(made, vectors=rows))
    if asks:
        for query in unlike(64):
            store.search(query[None], 10)
    while store.maintain(settle=True):
        pass
    (part,) = (part for part in store.view.segments if part.live)
    plain = calibrate(HOST, HOST.kinds["graph"], part.segment.index, rows, "cosine")  # type: ignore[attr-defined]
    assert (part.segment.calibration.effort(0.95) > plain.effort(0.95)) == asks  # type: ignore[attr-defined]
