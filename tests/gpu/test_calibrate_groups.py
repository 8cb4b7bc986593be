"""What an index is asked when it is calibrated, and that every kind of rows gets what was promised."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu import calibrate_groups
from headrace.gpu.backend import resolve
from headrace.gpu.calibrate import EXACT, calibrate
from headrace.gpu.calibrate_groups import Group, spreads
from headrace.gpu.calibrate_parts import places, two_kinds, worst
from headrace.gpu.host import storage
from headrace.gpu.index_spec import IndexSpec, build_params
from tests.gpu.searches import random_rows

HOST = resolve("host")
N = 6000


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of FAISS that wait for each other on busy cores take ten times as long."""
    with storage.openmp(1):
        yield


def noise(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, 32))


def near_copies(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.random.default_rng(7).normal(size=(20, 32))[rng.integers(0, 20, n)] + 0.3 * rng.normal(size=(n, 32))


def of_low_rank(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(size=(n, 4)) @ np.random.default_rng(7).normal(size=(4, 32)) / 2 + 0.05 * rng.normal(size=(n, 32))


def drifting(rng: np.random.Generator, n: int) -> np.ndarray:
    return noise(rng, n) + 15 * rng.random((n, 1))


def early(rng: np.random.Generator, n: int) -> np.ndarray:
    return noise(rng, n) + 4 * rng.random((n, 1))


def made_for(metric: str, points: np.ndarray) -> np.ndarray:
    made = points / np.linalg.norm(points, axis=1, keepdims=True) if metric == "cosine" else points
    return made.astype(np.float32)


def mixed(one: Any, other: Any, metric: str, seed: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return made_for(metric, rng.permutation(np.concatenate([one(rng, N // 2), other(rng, N // 2)])))


def recall(kind: Any, index: Any, vectors: np.ndarray, queries: np.ndarray, metric: str, effort: int) -> float:
    if effort == EXACT:
        return 1.0
    return Group(HOST, vectors, metric, 10, queries).found(kind, index, len(queries), effort)


@pytest.mark.parametrize("other", [near_copies, of_low_rank])
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
@pytest.mark.parametrize("name", ["graph", "ivf_pq"])
def test_of_mixed_rows_new_ones_of_the_harder_kind_get_what_was_promised(name: str, metric: str, other: Any) -> None:
    vectors, kind = mixed(noise, other, metric), HOST.kinds[name]
    params = build_params(IndexSpec(name, graph_degree=12, graph_effort=40), *vectors.shape)
    index = kind.build(vectors, metric, params)
    effort = calibrate(HOST, kind, index, vectors, metric).effort(0.95)
    rng = np.random.default_rng(11)
    for draw in (noise, other):
        queries = made_for(metric, draw(rng, 300))
        assert recall(kind, index, vectors, queries, metric, effort) >= 0.93, (draw, effort)


@pytest.mark.parametrize("name", ["graph", "ivf_pq"])
def test_where_no_effort_finds_what_the_earliest_of_drifting_rows_need_the_search_is_exact(name: str) -> None:
    vectors, kind = drifting(np.random.default_rng(3), N).astype(np.float32), HOST.kinds[name]
    index = kind.build(vectors, "ip", build_params(IndexSpec(name, graph_degree=12, graph_effort=40), *vectors.shape))
    effort = calibrate(HOST, kind, index, vectors, "ip").effort(0.95)
    queries = early(np.random.default_rng(11), 300).astype(np.float32)
    assert recall(kind, index, vectors, queries, "ip", effort) >= 0.92


def test_what_is_asked_besides_depends_on_what_the_rows_are_like() -> None:
    def count(vectors: np.ndarray, metric: str) -> int:
        found = spreads(HOST, vectors, metric, 64, np.random.default_rng(5))
        assert all(points.shape == (64, 32) and points.dtype == np.float32 for points in found)
        return len(found)

    rng = np.random.default_rng(3)
    for metric in ("cosine", "l2"):
        assert count(made_for(metric, noise(rng, 3000)), metric) == 1
        assert count(made_for(metric, 9 * near_copies(rng, 3000)), metric) == 0, "nobody asks between clusters"
        assert count(mixed(noise, near_copies, metric), metric) == 1
    away = np.concatenate([noise(rng, 3000), 50 + near_copies(rng, 3000)]).astype(np.float32)
    (points,) = spreads(HOST, away, "l2", 64, np.random.default_rng(5))
    assert abs(points.mean()) < 1, "the noise is what its own mean and spread describe, not those of all rows"
    assert spreads(HOST, away[:1], "l2", 1, rng) == []


class Finds:
    """Always the same rows, of which the first is the one that is asked about."""

    def __init__(self, vectors: np.ndarray, kept: slice) -> None:
        self.vectors, self.kept, self.asked = vectors, kept, 0

    def search(self, index: Any, allowed: Any, queries: Any, k: int, *, effort: int) -> Any:
        self.asked += len(queries)
        scores, found = HOST.exact.search(self.vectors, None, queries, 2 * k, "cosine")
        return scores[:, self.kept], found[:, self.kept]


def test_a_row_is_not_asked_about_itself() -> None:
    vectors = random_rows(600, 16, "cosine")
    for kept, found in ((slice(0, 10), 1.0), (slice(1, 11), 1.0), (slice(5, 15), 5 / 9), (slice(10, 20), 0.0)):
        (group,) = calibrate_groups.rows(HOST, vectors, "cosine", 10, 96, np.random.default_rng(0))
        kind: Any = Finds(vectors, kept)
        assert group.found(kind, None, 64, 4) == pytest.approx(found)
        assert kind.asked == 96, "rows are asked all, so that a part of them can be told from chance"
    assert calibrate_groups.rows(HOST, vectors[:10], "cosine", 10, 10, np.random.default_rng(0)) == []


def test_a_group_that_found_enough_is_not_asked_again_with_more_effort() -> None:
    vectors = random_rows(600, 16, "cosine")
    group, kind = Group(HOST, vectors, "cosine", 10, random_rows(80, 16, "cosine", 1)), Finds(vectors, slice(0, 10))
    few: Any = kind
    assert group.found(few, None, 16, 8, 0.99) == 1
    assert group.found(few, None, 80, 16, 0.99) == 1
    assert kind.asked == 96, "that few found all says little"
    assert group.found(few, None, 80, 32, 0.99) == 1
    assert kind.asked == 96
    group.found(few, None, 80, 8, 0.99)
    assert kind.asked == 176, "less effort may find less"


@given(st.lists(st.floats(0, 1e30), max_size=60))
def test_either_kind_is_a_tenth_of_the_rows_and_all_of_one_are_farther(some: list[float]) -> None:
    far = two_kinds(np.array(some))
    if far is not None:
        assert min(far.sum(), (~far).sum()) >= len(some) / 10
        assert np.array(some)[far].min() > np.array(some)[~far].max()


def test_kinds_are_told_by_two_values_of_the_distance() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(10, 1, 48)
    assert two_kinds(np.repeat(one, 2)) is None
    assert two_kinds(np.full(96, 3.0)) is None
    assert two_kinds(np.repeat([3.0, 3.3], 48)) is None, "of small whole numbers distances have few values"
    assert two_kinds(np.exp(rng.normal(0, 3, 96))) is None, "lengths that differ by orders of magnitude are one kind"
    for factor in (0, 1e-3, 0.3):
        far = two_kinds(np.concatenate([factor * one, one]))
        assert far is not None
        assert far.tolist() == [False] * 48 + [True] * 48
    assert two_kinds(np.concatenate([one, [1e-3, 1e3]])) is None, "two rows are no kind"


def test_a_part_counts_only_where_chance_would_hardly_have_it_so_low() -> None:
    labels = np.repeat(np.arange(4, dtype=np.int32), 48)
    same = np.tile([10, 9, 8, 10], 48)
    hard = np.where(labels == 2, 6, same)
    assert worst(same, 10, labels) == pytest.approx(0.925)
    assert worst(same + (labels == 1) * np.tile([-1, 0, 0, 0], 48), 10, labels) == pytest.approx(0.91875)
    assert worst(hard, 10, labels) == pytest.approx(0.62), "0.02 are let pass"
    assert worst(hard, 10, None) == pytest.approx(hard.mean() / 10)
    assert worst(hard[90:110], 10, labels[90:110]) == pytest.approx(hard[90:110].mean() / 10), "too few to tell"


def test_places_are_four_where_points_allow_it() -> None:
    points = np.repeat(np.eye(4, 8, dtype=np.float32), 12, axis=0)
    assert len({tuple(part) for part in places(HOST, points).reshape(4, 12)}) == 4
    assert places(HOST, points[:3]).tolist() == [0] * 3
    assert places(HOST, points * np.float32(1e30)).tolist() == [0] * 48, "squares of distances would be infinite"
