"""Effort for a recall, and what is promised about it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.backend import resolve
from headrace.gpu.calibrate import Calibration, calibrate
from headrace.gpu.errors import BackendError
from headrace.gpu.index_spec import IndexSpec, build_params
from tests.gpu.searches import random_rows

HOST = resolve("host")

CALIBRATIONS = st.lists(st.tuples(st.integers(1, 2000), st.floats(0, 1)), min_size=1, max_size=12).map(
    lambda pairs: Calibration(
        tuple(zip(sorted({effort for effort, _ in pairs}), sorted(recall for _, recall in pairs), strict=False))
    )
)


@given(CALIBRATIONS, st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_higher_target_never_takes_less_effort(calibration: Calibration, one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert calibration.effort(low) <= calibration.effort(high)


@given(CALIBRATIONS, st.floats(0.01, 1))
def test_the_effort_is_the_least_that_reached_the_target(calibration: Calibration, target: float) -> None:
    effort = calibration.effort(target)
    (first, _), (last, most) = calibration.pairs[0], calibration.pairs[-1]
    assert first <= effort <= last
    if target > most:
        assert effort == last
    else:
        assert calibration.recall(effort) >= target - 1e-9
        assert effort == first or calibration.recall(effort - 1) < target


@given(CALIBRATIONS, st.integers(0, 3000), st.integers(0, 3000))
def test_recall_rises_with_effort(calibration: Calibration, one: int, two: int) -> None:
    low, high = sorted((one, two))
    assert calibration.recall(low) <= calibration.recall(high)
    assert all(calibration.recall(effort) == pytest.approx(recall) for effort, recall in calibration.pairs)


@given(CALIBRATIONS)
def test_a_calibration_survives_the_wire(calibration: Calibration) -> None:
    assert Calibration.from_wire(json.loads(json.dumps(calibration.to_wire()))) == calibration


@pytest.mark.parametrize(
    "pairs", [[], [[8, 0.9], [4, 0.95]], [[4, 0.9], [8, 0.8]], [[4, 0.9], [4, 0.9]], [[4]], "text", 7]
)
def test_what_is_no_calibration_is_refused(pairs: Any) -> None:
    with pytest.raises(BackendError, match="calibration"):
        Calibration.from_wire(pairs)


class Kind:
    """An index that finds so many of the ten best as it is told to, by effort."""

    def __init__(self, hits: dict[int, int]) -> None:
        self.hits, self.searched = hits, []

    def asked(self) -> np.ndarray:
        return np.concatenate([queries for _, queries in self.searched])

    def efforts(self, index: Any, k: int) -> tuple[int, ...]:
        return tuple(self.hits)

    def search(self, index: Any, allowed: Any, queries: Any, k: int, *, effort: int) -> Any:
        assert allowed is None
        self.searched.append((effort, queries))
        scores, rows = HOST.exact.search(index, None, queries, 2 * k, "ip")
        kept = np.r_[: self.hits[effort], k : 2 * k - self.hits[effort]]
        return scores[:, kept], rows[:, kept]


def run(kind: Kind, vectors: np.ndarray, **given: Any) -> Calibration:
    return calibrate(HOST, kind, vectors, vectors, "ip", **given)  # type: ignore[arg-type]


def test_recall_is_counted_among_the_ten_best_and_never_falls() -> None:
    kind = Kind({4: 3, 8: 9, 16: 7, 32: 10, 64: 10})
    calibration = run(kind, random_rows(500, 8))
    assert calibration.pairs == ((4, 0.3), (8, 0.9), (16, 0.9), (32, 1.0))
    assert list(dict(kind.searched)) == [4, 8, 16, 32], "nothing is tried beyond the best"
    assert max(len(queries) for _, queries in kind.searched) <= 8, "a large batch may be answered exactly"


def test_the_same_seed_asks_the_same_and_no_more_than_it_may() -> None:
    vectors = random_rows(500, 8)
    one, two, other = Kind({4: 10}), Kind({4: 10}), Kind({4: 10})
    run(one, vectors, queries=20)
    run(two, vectors, queries=20)
    run(other, vectors, queries=20, seed=1)
    asked = one.asked()
    assert (asked.shape, asked.dtype) == ((20, 8), np.float32)
    np.testing.assert_array_equal(asked, two.asked())
    assert (asked != other.asked()).any()


def test_no_query_is_a_row_but_all_are_near_one() -> None:
    vectors = random_rows(2000, 16, "cosine")
    kind = Kind({4: 10})
    calibrate(HOST, kind, vectors, vectors, "cosine", queries=50)  # type: ignore[arg-type]
    asked = kind.asked()
    np.testing.assert_allclose(np.linalg.norm(asked, axis=1), 1, rtol=1e-5)
    nearest = (asked @ vectors.T).max(axis=1)
    assert nearest.max() < 0.999
    tenth = np.sort(vectors @ vectors.T, axis=1)[:, -11]
    assert nearest.mean() > tenth.mean() + 0.05


def test_an_exact_index_is_not_searched() -> None:
    kind = Kind({0: 10})
    assert run(kind, random_rows(50, 4)) == Calibration(((0, 1.0),))
    assert kind.searched == []


@pytest.mark.parametrize("kind", ["graph", "ivf_pq"])
@pytest.mark.parametrize("n", [1, 3, 11, 60])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_few_rows_are_found_whatever_the_effort(kind: str, n: int, metric: str) -> None:
    vectors = random_rows(n, 4, metric)
    index = HOST.kinds[kind].build(vectors, metric, build_params(IndexSpec(kind=kind), n, 4))
    calibration = calibrate(HOST, HOST.kinds[kind], index, vectors, metric)
    assert calibration.effort(1.0) == calibration.pairs[0][0]
    assert calibration.pairs[0][1] == 1


def test_equal_rows_count_as_found_whichever_of_them_come_back() -> None:
    vectors = np.repeat(random_rows(3, 4), 400, axis=0)
    params = build_params(IndexSpec(kind="graph"), *vectors.shape)
    index = HOST.kinds["graph"].build(vectors, "l2", params)
    assert calibrate(HOST, HOST.kinds["graph"], index, vectors, "l2").pairs[-1][1] > 0.99


def test_held_out_queries_get_the_recall_that_was_promised() -> None:
    # Rows of 8 degrees of freedom among 48 numbers: easy enough for HNSW, hard enough that little effort is not enough.
    rng = np.random.default_rng(0)
    every = (rng.normal(size=(5300, 8)) @ rng.normal(size=(8, 48)) + 0.1 * rng.normal(size=(5300, 48))).astype(
        np.float32
    )
    vectors, queries = every[:5000], every[5000:]
    for kind in ("graph", "ivf_pq"):
        params = build_params(IndexSpec(kind=kind, graph_degree=8, graph_effort=24), *vectors.shape)
        index = HOST.kinds[kind].build(vectors, "l2", params)
        calibration = calibrate(HOST, HOST.kinds[kind], index, vectors, "l2")
        truth = HOST.exact.search(vectors, None, queries, 10, "l2")[0][:, -1:]
        for target in (0.9, 0.97):
            scores = HOST.kinds[kind].search(index, None, queries, 10, effort=calibration.effort(target))[0]
            assert (scores <= truth * 1.0001).mean() >= target - 0.01, (kind, target)


def test_the_effort_of_a_target_that_none_reached_is_the_highest() -> None:
    calibration = run(Kind({4: 3, 8: 6}), random_rows(500, 8))
    assert calibration.effort(0.95) == 8
    assert calibration.recall(6) == pytest.approx(0.45)
