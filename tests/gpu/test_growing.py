"""Vectors that no index has been built for yet: exact, also where the host reads them as bytes first."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.gpu.backend import Backend
from headrace.gpu.host import exact, growing
from headrace.gpu.host.growing import CodedVectors, Codes
from headrace.gpu.host.refined import Refined
from headrace.gpu.index_spec import DTYPES
from tests.gpu.searches import METRICS, check_search, on_host, random_rows, true_scores


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_came_in_pieces_are_searched_exactly(backend: Backend, metric: str, dtype: str) -> None:
    xp = backend.xp
    rows, queries = random_rows(5000, 24, metric).astype(dtype), random_rows(9, 24, metric, seed=7)
    kept = backend.growing.vectors(24, dtype, metric, 4096)
    for start in (0, 1, 700, 4000):
        end = {0: 1, 1: 700, 700: 4000, 4000: 5000}[start]
        grown = kept.nbytes + kept.growth(end - start)
        kept.append(xp.asarray(rows[start:end]))
        assert (len(kept), kept.nbytes) == (end, grown)
    allowed = np.random.default_rng(1).random(4500) < 0.6
    for asked in (queries, queries[:1]):
        answer = kept.search(xp.asarray(allowed), xp.asarray(asked), 10, 4500)
        check_search(answer, rows[:4500], allowed, asked, 10, metric)
    np.testing.assert_array_equal(on_host(kept.take(np.array([4999, 0]))), rows[[4999, 0]].astype(np.float32))


def coded(monkeypatch: pytest.MonkeyPatch, rows: np.ndarray, metric: str, pieces: int = 4) -> CodedVectors:
    """Kept as bytes from the first piece on."""
    monkeypatch.setattr(growing, "_FEW", 1)
    kept = CodedVectors(rows.shape[1], metric, len(rows))
    for piece in np.array_split(rows, pieces):
        kept.append(piece)
    return kept


SHAPES = (
    "normal", "unit", "tight groups", "far from the origin", "one long row", "grows", "equal", "tiny", "huge", "whole"
)  # fmt: skip


def shaped(shape: str, n: int, dim: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(n, dim))
    made: Any = {
        "normal": lambda: normal,
        "unit": lambda: normal / np.linalg.norm(normal, axis=1, keepdims=True),
        "tight groups": lambda: rng.normal(size=(8, dim))[rng.integers(0, 8, n)] + 1e-4 * normal,
        "far from the origin": lambda: 1000 + normal,
        "one long row": lambda: normal * np.where(np.arange(n) == n // 2, 1e4, 1)[:, None],
        "grows": lambda: normal * np.geomspace(1e-3, 1e3, n)[:, None],
        "equal": lambda: np.repeat(normal[:4], -(-n // 4), axis=0)[:n],
        "tiny": lambda: normal * 1e-36,
        "huge": lambda: normal * 1e17,
        "whole": lambda: rng.integers(-3, 4, size=(n, dim)),
    }[shape]()
    return np.asarray(made, dtype=np.float32)


@settings(deadline=None, max_examples=60)
@given(
    shape=st.sampled_from(SHAPES),
    metric=st.sampled_from(["ip", "l2"]),
    dim=st.sampled_from([1, 7, 32, 48]),
    k=st.integers(1, 4),
    seed=st.integers(0, 1000),
    share=st.sampled_from([1.0, 0.5, 0.1]),
    near=st.booleans(),
)
def test_no_row_is_missed(shape: str, metric: str, dim: int, k: int, seed: int, share: float, near: bool) -> None:
    rows = shaped(shape, 1200, dim, seed)
    rng = np.random.default_rng(seed + 1)
    queries = rows[rng.integers(0, 1200, 4)] if near else rng.normal(size=(4, dim)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        kept = coded(patch, rows, metric)
        allowed = rng.random(1100) < share
        for asked, some in ((queries, allowed), (queries[:1], np.ones(1100, dtype=bool))):
            scores, found = kept.search(some, asked, k, 1100)
            plain, _ = exact.search(rows[:1100], some, asked, k, metric)
            assert some[found].all()
            assert all(len(set(line)) == k for line in found.tolist())
            # A sum in another order differs by a rounding of the largest terms, not of what is left of them.
            terms = np.abs(asked.astype(np.float64)) @ np.abs(rows[:1100].astype(np.float64)).max(axis=0)
            loose = 1e-5 * (np.abs(plain).astype(np.float64) + (terms[:, None] if metric == "ip" else 0))
            assert (np.abs(scores.astype(np.float64) - plain) <= loose).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dim", [1, 2, 32, 100])
def test_the_bound_holds_for_every_other_row(metric: str, dim: int) -> None:
    for shape in SHAPES[:6]:
        rows = shaped(shape, 1500, dim, 5)
        if metric == "cosine":
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        # In few dimensions all errors may point the same way, and then the bound is tight.
        queries = np.concatenate([rows[:60] * 0.99, random_rows(60, dim, metric, seed=3), np.zeros((1, dim), "f4")])
        codes = Codes(rows[:700], metric, 1500)
        codes.append(rows[700:])
        bound, found = codes.nearest(None, queries, 1, 1500)
        truth = true_scores(rows, queries, metric)
        np.put_along_axis(truth, found, -np.inf, axis=1)
        best = truth.max(axis=1)
        best = np.sqrt(-best) if metric == "l2" else -best
        known = ~np.isnan(bound)
        assert known[:-1].all()
        assert (best[known] >= (bound if metric == "l2" else -bound)[known]).all(), shape


@pytest.mark.parametrize("several", [4, 12, 200])
@pytest.mark.parametrize("dim", [1, 2, 32, 100])
def test_what_a_lone_query_is_told_is_certain(dim: int, several: int) -> None:
    told = 0
    for shape in SHAPES[:7]:
        rows = shaped(shape, 1500, dim, 5)
        queries = np.concatenate([rows[:40] * 0.99, random_rows(40, dim, "ip", seed=3), np.zeros((1, dim), "f4")])
        codes = Codes(rows[:700], "ip", 1500)
        codes.append(rows[700:])
        view = Refined(codes, rows)
        truth = true_scores(rows, queries, "ip")
        off = 1e-6 * np.abs(queries.astype(np.float64)) @ np.abs(rows.astype(np.float64)).max(axis=0)
        for query, scores, loose in zip(queries, truth, off, strict=True):
            if answer := view.search(query[None], 3, several):
                told += 1
                np.testing.assert_allclose(answer[0][0], scores[answer[1][0]], rtol=1e-5, atol=loose)
                np.testing.assert_allclose(answer[0][0], -np.sort(-scores)[:3], rtol=1e-5, atol=loose)
    assert several < 200 or told > 80


def test_a_lone_query_is_told_the_first_of_equal_rows() -> None:
    rows = np.tile(random_rows(500, 32, "cosine"), (3, 1))
    view = Refined(Codes(rows, "ip", 1500), rows)
    answer = view.search(rows[:1], 2, 40)
    assert answer
    assert answer[1].tolist() == [[0, 500]]


@pytest.mark.parametrize("count", [1, 5])
def test_bytes_answer_where_rows_differ(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4000, 32, "cosine")
    kept = coded(monkeypatch, rows, "cosine")
    monkeypatch.setattr(exact, "search", None)  # to be called would be an error
    answer = kept.search(None, rows[:count], 3, 4000)
    check_search(answer, rows, np.ones(4000, dtype=bool), rows[:count], 3, "cosine")


@pytest.mark.parametrize(("count", "look"), [(1, (Refined, "search")), (2, (Codes, "nearest"))])
def test_rows_that_are_alike_are_read_whole_and_the_bytes_tried_less_often(
    count: int, look: tuple[type, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.repeat(random_rows(2, 32, "cosine"), 2000, axis=0)
    kept = coded(monkeypatch, rows, "cosine")
    tried = []
    before = getattr(*look)
    monkeypatch.setattr(*look, lambda *args: tried.append(1) or before(*args))
    for _ in range(100):
        _, found = kept.search(None, rows[:count], 3, 4000)
        assert (found < 2000).all()
    assert 2 <= len(tried) <= 8


def test_rows_unlike_the_first_ones_make_new_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(4000, 32)
    rows[1000:] *= 50
    kept = coded(monkeypatch, rows, "l2", pieces=8)
    assert kept._codes is not None
    assert kept._codes.learnt > 1000
    assert kept._codes.gap < 5
    check_search(kept.search(None, rows[:3], 3, 4000), rows, np.ones(4000, dtype=bool), rows[:3], 3, "l2")
