"""Effort for a recall, and what is promised about it."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.backend import resolve
from headrace.gpu.calibrate import EXACT, Calibration, _climb, calibrate
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
    if target > most:
        assert effort == EXACT
        assert calibration.recall(effort) == 1
    else:
        assert first <= effort <= last
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


def run(kind: Kind, vectors: np.ndarray, metric: str = "cosine", **given: Any) -> Calibration:
    """Calibrate it as a graph: rows themselves are not asked about unless the metric is ip."""
    graph = dataclasses.replace(HOST, kinds={"graph": kind})
    return calibrate(graph, kind, vectors, vectors, metric, **given)  # type: ignore[arg-type]


def test_recall_is_counted_among_the_ten_best_and_never_falls() -> None:
    kind = Kind({4: 3, 8: 9, 16: 7, 32: 10, 64: 10})
    calibration = run(kind, random_rows(500, 8, "cosine"), recall_target=0.3)
    assert calibration.pairs == ((4, 0.3), (8, 0.9), (16, 0.9), (32, 1.0))
    assert list(dict(kind.searched)) == [4, 8, 16, 32], "nothing is tried beyond the best"
    assert max(len(queries) for _, queries in kind.searched) <= 8, "a large batch may be answered exactly"


def test_the_same_seed_asks_the_same_and_no_more_than_it_may() -> None:
    vectors = random_rows(500, 8, "cosine")
    one, two, other = Kind({4: 10}), Kind({4: 10}), Kind({4: 10})
    run(one, vectors, queries=20)
    run(two, vectors, queries=20)
    run(other, vectors, queries=20, seed=1)
    asked = one.asked()
    assert (asked.shape, asked.dtype) == ((40, 8), np.float32), "two groups, because these rows are only noise"
    np.testing.assert_array_equal(asked, two.asked())
    assert (asked[:20] != other.asked()[:20]).any()


def test_no_query_is_a_row_but_all_are_near_one() -> None:
    vectors = random_rows(2000, 16, "cosine")
    kind = Kind({4: 10})
    run(kind, vectors, queries=50)
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
    every = (rng.normal(size=(3300, 8)) @ rng.normal(size=(8, 48)) + 0.1 * rng.normal(size=(3300, 48))).astype(
        np.float32
    )
    vectors, queries = every[:3000], every[3000:]
    check_promise(vectors, queries, "l2", margin=0.01)


def clusters(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(40, 24))[rng.integers(0, 40, n)] * 2 + rng.normal(size=(n, 24))


def lengths(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, 32)) * rng.lognormal(0, 1, size=(n, 1))


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.normal(size=(n, 48)),
        lambda rng, n: rng.integers(0, 2, size=(n, 48)),
        lambda rng, n: 1000 + rng.normal(size=(n, 32)),
        clusters,
        lengths,
    ],
    ids=["gauss", "binary", "far away", "clusters", "lengths"],
)
def test_new_rows_get_what_was_promised_whatever_the_rows_are_like(draw: Any, metric: str) -> None:
    every = np.asarray(draw(np.random.default_rng(1), 3120), dtype=np.float32)
    if metric == "cosine":
        every /= np.linalg.norm(every, axis=1, keepdims=True)
    check_promise(every[:3000], every[3000:], metric, margin=0.04)


def check_promise(vectors: np.ndarray, queries: np.ndarray, metric: str, *, margin: float) -> None:
    for kind in ("graph", "ivf_pq"):
        params = build_params(IndexSpec(kind=kind, graph_degree=8, graph_effort=24), *vectors.shape)
        index = HOST.kinds[kind].build(vectors, metric, params)
        calibration = calibrate(HOST, HOST.kinds[kind], index, vectors, metric)
        every = queries.astype(np.float64) @ vectors.T.astype(np.float64)
        if metric == "l2":
            wide = vectors.astype(np.float64)
            every = 2 * every - np.einsum("ij,ij->i", wide, wide)
        truth = -np.sort(-every, axis=1)[:, 9:10]
        slack, scores = 1e-6 * np.abs(truth), np.empty((len(queries), 10))
        for target in (0.9, 0.97):
            effort = calibration.effort(target)
            for some in range(0, len(queries), 6):  # a large batch may be answered exactly
                asked = slice(some, some + 6)
                rows = HOST.kinds[kind].search(index, None, queries[asked], 10, effort=effort)[1]
                scores[asked] = np.take_along_axis(every[asked], rows, axis=1)
            assert (scores >= truth - slack).mean() >= target - margin, (kind, target)


def test_a_target_that_no_effort_reached_takes_an_exact_search() -> None:
    calibration = run(Kind({4: 3, 8: 6}), random_rows(500, 8, "cosine"), recall_target=0.3)
    assert calibration.effort(0.6) == 8
    assert calibration.effort(0.95) == EXACT > 1_000_000_000
    assert calibration.best == pytest.approx(0.6)
    assert calibration.recall(6) == pytest.approx(0.45)


def test_no_row_is_asked_about_itself_and_what_lies_side_by_side_is_not_paired() -> None:
    vectors = np.repeat(np.eye(8, dtype=np.float32), 16, axis=0)  # sorted, as centroid routing leaves them
    kind = Kind({4: 10})
    calibrate(HOST, kind, vectors, vectors, "ip", queries=128)  # type: ignore[arg-type]
    asked = kind.asked()[:128]
    own = (np.abs(asked[:, None, :] - vectors[None, :, :]).max(axis=2) < 1e-6).any(axis=1)
    assert own.mean() < 0.3, "about one in eight has a twin as its other row"
    few = random_rows(24, 1)
    kind = Kind({4: 10})
    calibrate(HOST, kind, few, few, "ip", queries=128)  # type: ignore[arg-type]
    assert np.abs(kind.asked()[:24] - few.T).min() > 0, "also of few rows none meets itself"


def test_one_row_that_is_far_longer_lets_no_other_pass() -> None:
    vectors = random_rows(2000, 16)
    vectors[0] *= 1e6
    assert run(Kind({4: 5, 8: 10}), vectors, "ip", recall_target=0.5).pairs[0][1] <= 0.55


EFFORTS = st.sets(st.integers(1, 4000), min_size=1, max_size=16).map(sorted)
RECALLS = st.lists(st.floats(0, 1), min_size=16, max_size=16)


@given(EFFORTS, RECALLS, RECALLS, st.floats(0.01, 1))
def test_whatever_a_few_queries_say_the_target_is_found(
    efforts: list[int], some: list[float], few: list[float], target: float
) -> None:
    recalls, guesses = dict(zip(efforts, sorted(some), strict=False)), dict(zip(efforts, few, strict=False))
    tried = _climb(efforts, target, recalls.__getitem__, guesses.__getitem__)
    order = sorted(tried)
    assert all(tried[effort] == recalls[effort] for effort in order)
    assert order[0] == efforts[0] or tried[order[0]] < target, "an effort for the target is not far too much"
    assert order[-1] == efforts[-1] or tried[order[-1]] >= min(max(target, 0.99), 0.9995)
    for low, high in itertools.pairwise(order):
        assert not any(2 * low <= effort < high for effort in efforts), "none is left out"


def test_what_nobody_asks_for_is_not_tried() -> None:
    kind = Kind({4: 3, 8: 5, 16: 8, 24: 8, 32: 9, 64: 10, 128: 10, 256: 10})
    calibration = run(kind, random_rows(500, 8, "cosine"), recall_target=0.93)
    assert calibration.pairs == ((32, 0.9), (64, 1.0))
    few = [sum(len(asked) for effort, asked in kind.searched if effort == low) for low in (4, 8, 16, 24)]
    assert few == [32, 32, 32, 0], "16 of each group, to see where to begin"
    assert max(effort for effort, _ in kind.searched) == 64
    better = Kind({4: 9, 8: 9, 16: 9, 32: 10})
    pairs = run(better, random_rows(500, 8, "cosine"), recall_target=0.5).pairs
    assert pairs == ((4, 0.9), (8, 0.9), (16, 0.9), (32, 1.0))


@pytest.mark.parametrize(("target", "last"), [(0.5, 4), (0.95, 4), (0.99, 4), (0.993, 8), (0.999, 16), (1.0, 32)])
def test_no_more_is_tried_than_the_target_takes_and_a_little(target: float, last: int) -> None:
    recalls = {1: 0.4, 2: 0.9, 4: 0.99, 8: 0.995, 16: 0.9991, 32: 0.9996, 64: 1.0}
    tried = _climb(list(recalls), target, recalls.__getitem__, recalls.__getitem__)
    assert max(tried) == last
