"""Filters and dead rows that have to do with where the query is, on every backend and kind; and what decides there."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gpu import filtered
from headrace.gpu.backend import Backend
from headrace.gpu.index_spec import KINDS, IndexSpec, build_params
from tests.gpu.searches import METRICS, check_search, on_host

TARGET = 0.95
EFFORTS = {"flat": 0, "graph": 16, "ivf_pq": 8}
"""They find more than 0.97 of what is asked for without a filter, and far fewer rows than are scored for it."""
GROUPS, ROWS, DIM = 20, 4000, 16

every_kind = pytest.mark.parametrize("kind", KINDS)
every_metric = pytest.mark.parametrize("metric", METRICS)


@functools.cache
def grouped(metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows in groups, as tenants and topics make them, and each row's group."""
    rng = np.random.default_rng(2)
    groups = rng.integers(0, GROUPS, ROWS)
    rows = (rng.normal(size=(GROUPS, DIM))[groups] + 0.3 * rng.normal(size=(ROWS, DIM))).astype(np.float32)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True) if metric == "cosine" else rows), groups


@pytest.fixture(scope="module")
def indexed(backend: Backend) -> Any:
    """Of kind and metric: the index over `grouped`, built once."""

    @functools.cache
    def build(kind: str, metric: str) -> Any:
        params = build_params(IndexSpec(kind), ROWS, DIM)
        return backend.kinds[kind].build(backend.xp.asarray(grouped(metric)[0]), metric, params)

    return build


def recall(
    backend: Backend, indexed: Any, kind: str, metric: str, allowed: np.ndarray, picked: np.ndarray, together: bool
) -> float:
    """Of 10 rows near the picked ones, asked for together or one by one."""
    xp, index, effort = backend.xp, indexed(kind, metric), EFFORTS[kind]
    vectors = grouped(metric)[0]
    queries = (vectors[picked] + 0.01).astype(np.float32)
    if metric == "cosine":
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    size = len(queries) if together else 1
    answers = [
        backend.kinds[kind].search(
            index, xp.asarray(allowed), xp.asarray(queries[start : start + size]), 10, effort=effort
        )
        for start in range(0, len(queries), size)
    ]
    scores, rows = (np.concatenate([on_host(answer[part]) for answer in answers]) for part in (0, 1))
    return check_search((scores, rows), vectors, allowed, queries, 10, metric, exact=kind == "flat")


def picked(among: np.ndarray, together: bool) -> np.ndarray:
    return np.random.default_rng(5).choice(np.flatnonzero(among), 30 if together else 8)


@every_kind
@every_metric
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("gone", [1, 4])
def test_where_a_whole_group_was_deleted(
    backend: Backend, indexed: Any, kind: str, metric: str, together: bool, gone: int
) -> None:
    groups = grouped(metric)[1]
    alive = groups >= gone
    asked = picked(~alive, together)
    assert recall(backend, indexed, kind, metric, alive, asked, together) >= TARGET - 0.02


@every_kind
@every_metric
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kept", [GROUPS // 2, GROUPS - 4])
def test_a_filter_on_groups_asked_from_within_and_without(
    backend: Backend, indexed: Any, kind: str, metric: str, together: bool, kept: int
) -> None:
    allowed = grouped(metric)[1] < kept
    for place in (allowed, ~allowed):
        asked = picked(place, together)
        assert recall(backend, indexed, kind, metric, allowed, asked, together) >= TARGET - 0.02


@every_kind
@every_metric
@pytest.mark.parametrize("together", [True, False])
def test_a_filter_that_cuts_through_groups(
    backend: Backend, indexed: Any, kind: str, metric: str, together: bool
) -> None:
    first = grouped(metric)[0][:, 0]
    allowed = first < np.median(first)
    asked = picked(np.ones(ROWS, dtype=bool), together)
    assert recall(backend, indexed, kind, metric, allowed, asked, together) >= TARGET - 0.02


@every_kind
@every_metric
@pytest.mark.parametrize("together", [True, False])
def test_filters_of_every_share(backend: Backend, indexed: Any, kind: str, metric: str, together: bool) -> None:
    drawn = np.random.default_rng(6).random(ROWS)
    asked = picked(np.ones(ROWS, dtype=bool), together)
    for share in (1.0, 0.99, 0.9, 0.5, 0.1, 0.01, 0.001):
        assert recall(backend, indexed, kind, metric, drawn < share, asked, together) >= TARGET - 0.02, share


# --- what decides


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 200), st.sampled_from([0.999, 0.95, 0.7, 0.5, 0.2, 0.1, 0.02]), st.integers(0, 2**32))
def test_so_deep_lie_the_best_allowed_rows_if_they_are_strewn_at_random(k: int, share: float, seed: int) -> None:
    total = 1_000_000
    depth = filtered.depth(k, round(total * share), total)
    # The place of the k-th allowed one is the sum of k waiting times.
    places = k + np.random.default_rng(seed).negative_binomial(k, share, size=2000)
    assert (places > depth).mean() < 0.008
    assert depth <= 3 * k / share + 8 / share, "far deeper than it need be"


def test_depth_ends_at_all_rows_and_starts_at_k() -> None:
    assert filtered.depth(10, 5, 100) == 100
    assert filtered.depth(10, 100, 100) == 10
    assert filtered.depth(1, 1, 1) == 1


@settings(deadline=None)
@given(st.data())
def test_the_first_allowed_ones_are_kept_in_their_order(data: st.DataObject) -> None:
    n, wide = data.draw(st.integers(1, 30)), data.draw(st.integers(1, 12))
    k, queries = data.draw(st.integers(1, wide)), data.draw(st.integers(1, 4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    allowed = rng.random(n) < data.draw(st.sampled_from([0, 0.5, 1]))
    rows = np.full((queries, wide), -1)
    for line in rows:
        some = rng.permutation(n)[: rng.integers(0, wide + 1)]
        line[: len(some)] = some
    metric = data.draw(st.sampled_from(["ip", "l2"]))
    scores = rng.random((queries, wide)).astype(np.float32)
    values, best = filtered.keep(np, scores, rows, allowed, k, metric)
    assert (values.dtype, values.shape, best.shape) == (np.float32, (queries, k), (queries, k))
    worst = math.inf if metric == "l2" else -math.inf
    for line, points, got, value in zip(rows, scores, best, values, strict=True):
        wanted = [place for place in range(wide) if line[place] >= 0 and allowed[line[place]]][:k]
        rest = [-1] * (k - len(wanted))
        assert got.tolist() == [*line[wanted], *rest]
        assert value.tolist() == [*points[wanted], *[worst] * len(rest)]


class Told:
    """A search that is told at which factor each query, a number, gets its rows; it notes what was asked."""

    def __init__(self, *needs: int) -> None:
        self.needs = needs
        self.queries = np.arange(len(needs), dtype=np.float32)[:, None]
        self.asked: list[tuple[Any, list[int]]] = []

    def walk(self, some: np.ndarray, factor: int) -> tuple[np.ndarray, np.ndarray]:
        numbers = some[:, 0].astype(int).tolist()
        self.asked.append((factor, numbers))
        rows = np.array([[number, 7 if self.needs[number] <= factor else -1] for number in numbers])
        return rows.astype(np.float32), rows

    def exact(self, some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers = some[:, 0].astype(int).tolist()
        self.asked.append(("exact", numbers))
        rows = np.array([[number, 99] for number in numbers])
        return rows.astype(np.float32), rows


def test_only_queries_that_come_back_short_are_asked_again() -> None:
    told = Told(1, 4, 1000, 1, 16)
    scores, rows = filtered.search(np, told.queries, told.walk, told.exact, 2, 17)
    assert told.asked == [(1, [0, 1, 2, 3, 4]), (4, [1, 2, 4]), (16, [2, 4]), ("exact", [2])]
    assert rows.tolist() == [[0, 7], [1, 7], [2, 99], [3, 7], [4, 7]]
    np.testing.assert_array_equal(scores, rows)


def test_where_it_is_no_cheaper_nothing_is_asked_deeper() -> None:
    told = Told(1, 4)
    _, rows = filtered.search(np, told.queries, told.walk, told.exact, 2, 4)
    assert told.asked == [(1, [0, 1]), ("exact", [1])]
    assert rows.tolist() == [[0, 7], [1, 99]]


def test_fewer_rows_are_enough_where_fewer_are_allowed() -> None:
    told = Told(1000, 1000)
    filtered.search(np, told.queries, told.walk, told.exact, 1, 100)
    assert told.asked == [(1, [0, 1])]
