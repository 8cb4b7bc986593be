"""Squared distances that cancel, and numbers whose squares are infinite, on every backend and kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from headrace.gpu import ranking
from headrace.gpu.backend import Backend
from headrace.gpu.calibrate import calibrate
from headrace.gpu.index_spec import KINDS, IndexSpec, build_params
from tests.gpu.searches import on_host

N = 2400


def shifted(shape: str, dim: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    rows: Any = {
        "at the origin": lambda: rng.normal(size=(N, dim)),
        "mean 1000": lambda: 1000 + rng.normal(size=(N, dim)),
        "mean 100, close": lambda: 100 + 0.1 * rng.normal(size=(N, dim)),
        "two far groups": lambda: 1000.0 * rng.choice([-1, 1], size=(N, 1)) + rng.normal(size=(N, dim)),
        "a few long ones": lambda: rng.normal(size=(N, dim)) * np.where(np.arange(N) < 30, 1e6, 1)[:, None],
        "many lengths": lambda: rng.normal(size=(N, dim)) * rng.lognormal(0, 4, size=(N, 1)),
        "Unix seconds": lambda: rng.uniform(1.76e9, 1.76e9 + 6e5, size=(N, dim)),
        "metres": lambda: rng.uniform([4e5, 5.2e6], [6e5, 5.4e6], size=(N, 2)),
        "equal": lambda: np.repeat(100 * rng.normal(size=(3, dim)), N // 3, axis=0),
    }[shape]()
    return np.asarray(rows, dtype=np.float32)


SHAPES = [
    *(
        (shape, dim)
        for shape in ("at the origin", "mean 1000", "mean 100, close", "two far groups", "a few long ones")
        for dim in (8, 100)
    ),
    ("many lengths", 100),
    ("equal", 100),
    ("Unix seconds", 1),
    ("Unix seconds", 80),
    ("metres", 2),
]


def recall(answer: Any, vectors: np.ndarray, allowed: np.ndarray, queries: np.ndarray, k: int) -> float:
    """Judged by float64, and allowing for what float32 loses of a distance itself."""
    rows = on_host(answer[1])
    wide = vectors.astype(np.float64)
    hits = 0
    for query, line in zip(queries.astype(np.float64), rows, strict=True):
        assert len(set(line.tolist())) == k
        assert allowed[line].all()
        distances = ((wide - query) ** 2).sum(axis=1)
        last = np.sort(distances[allowed])[k - 1]
        hits += int((distances[line] <= last * (1 + 1e-5)).sum())
    return hits / rows.size


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_exact_search_is_exact(backend: Backend, shape: str, dim: int) -> None:
    xp, vectors = backend.xp, shifted(shape, dim)
    drawn = np.random.default_rng(3).random(N)
    for share in (1.0, 0.6, 0.05):
        allowed = drawn < share
        for queries in (vectors[:20], vectors[60:61], vectors[-12:] + np.float32(0.05)):
            answer = backend.exact.search(xp.asarray(vectors), xp.asarray(allowed), xp.asarray(queries), 10, "l2")
            assert recall(answer, vectors, allowed, queries, 10) == 1


@pytest.mark.parametrize("kind", ["flat", "graph", "ivf_pq"])
@pytest.mark.parametrize("shape", ["mean 1000"])
def test_a_calibrated_index_keeps_its_promise(backend: Backend, kind: str, shape: str) -> None:
    vectors = shifted(shape, 16)
    xp, module = backend.xp, backend.kinds[kind]
    index = module.build(xp.asarray(vectors), "l2", build_params(IndexSpec(kind), *vectors.shape))
    effort = calibrate(backend, module, index, xp.asarray(vectors), "l2").effort(0.95)
    for share in (1.0, 0.7):
        allowed = np.random.default_rng(3).random(N) < share
        queries = vectors[:40] + np.float32(0.1)
        answer = module.search(index, xp.asarray(allowed), xp.asarray(queries), 10, effort=effort)
        assert recall(answer, vectors, allowed, queries, 10) >= 0.93
        ones = [
            module.search(index, xp.asarray(allowed), xp.asarray(queries[i : i + 1]), 10, effort=effort)
            for i in range(9)
        ]
        rows = np.concatenate([on_host(one[1]) for one in ones])
        assert recall((None, rows), vectors, allowed, queries[:9], 10) >= 0.85


def test_the_bound_of_rounding_holds() -> None:
    rng = np.random.default_rng(4)
    for dim in (1, 7, 100, 1000):
        rows = (10 ** rng.uniform(-3, 3, size=(500, 1)) * (rng.normal(size=(500, dim)) + 3)).astype(np.float32)
        queries = rows[:20] + np.float32(1e-3)
        counted = 2 * (queries @ rows.T) - np.einsum("ij,ij->i", rows, rows)
        wide, asked = rows.astype(np.float64), queries.astype(np.float64)
        lengths = (wide**2).sum(axis=1)
        off = np.abs(counted - (2 * asked @ wide.T - lengths))
        assert (off <= ranking.rounding(dim) * ((asked**2).sum(axis=1)[:, None] + 2 * lengths)).all()


# --- numbers too large to square


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("many", [1, 300])
def test_numbers_whose_squares_are_infinite(backend: Backend, kind: str, metric: str, many: int) -> None:
    # FAISS would end the process while it trains codes over these.
    xp, module = backend.xp, backend.kinds[kind]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(N, 8)).astype(np.float32)
    vectors[:many] = rng.choice([-1e20, 1e20], size=(many, 8))
    index = module.build(xp.asarray(vectors), metric, build_params(IndexSpec(kind, graph_degree=8), N, 8))
    effort = module.efforts(index, 10)[-1]
    for size in (1, 20):
        queries = vectors[1000 : 1000 + size]
        _, rows = module.search(index, None, xp.asarray(queries), 10, effort=effort)
        if metric == "l2":
            assert on_host(rows)[:, 0].tolist() == list(range(1000, 1000 + size))
        module.search(index, None, xp.asarray(vectors[:size]), 10, effort=effort)  # ends


def test_exact_search_among_infinite_squares(backend: Backend) -> None:
    vectors = shifted("at the origin", 100)
    vectors[7], vectors[8] = 1e20, -1e20
    queries = np.concatenate([vectors[20:32], vectors[7:8], np.full((1, 100), np.nan, dtype=np.float32)])
    _, rows = backend.exact.search(backend.xp.asarray(vectors), None, backend.xp.asarray(queries), 3, "l2")
    assert on_host(rows)[:13, 0].tolist() == [*range(20, 32), 7]


def test_lengths_that_can_be_squared() -> None:
    rows = np.ones((10, 4), dtype=np.float32)
    assert ranking.squares(np, rows)
    assert ranking.squares(np, rows * np.float32(4e17))
    assert not ranking.squares(np, np.concatenate([rows, -rows[:1] * np.float32(1e18)]))
    assert not ranking.squares(np, np.full((2, 4), np.nan, dtype=np.float32))
    assert ranking.squares(np, np.full((2, 4), 60000, dtype=np.float16))


@pytest.mark.parametrize("masked", [False, True])
def test_measuring_every_row(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "_MOST_NUMBERS", 700)
    vectors = shifted("mean 1000", 8)
    allowed = np.arange(N) % 3 > 0
    answer = ranking.measure(np, vectors, allowed if masked else None, vectors[:9], 10)
    assert recall(answer, vectors, allowed if masked else np.ones(N, dtype=bool), vectors[:9], 10) == 1
    scores, rows = ranking.measure(np, vectors[:4], np.arange(4) > 1, vectors[:1], 6)
    assert rows[0, 2:].tolist() == [-1] * 4
    assert np.isinf(scores[0, 2:]).all()
    assert sorted(rows[0, :2].tolist()) == [2, 3]
    assert ranking.longest(np, vectors[:, :2]) == pytest.approx(float((vectors[:, :2] ** 2).sum(axis=1).max()))
