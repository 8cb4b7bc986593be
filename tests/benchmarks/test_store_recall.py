"""What was found of what is near, and the least setting that finds enough."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.store_recall import Floats, exact, least, least_share, matrix, recall


def _made(rows: int, queries: int = 5, dim: int = 8, seed: int = 0) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(seed)
    made = rng.standard_normal((rows + queries, dim), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made[queries:], made[:queries]


def test_exact_is_what_sorting_gives() -> None:
    rows, queries = _made(200)
    np.testing.assert_array_equal(exact(rows, queries, 10), np.argsort(-(queries @ rows.T), axis=1)[:, :10])


def test_exact_gives_no_more_rows_than_there_are() -> None:
    rows, queries = _made(3)
    assert exact(rows, queries, 10).shape == (5, 3)


@given(st.integers(0, 10), st.integers(0, 2**32 - 1))
def test_recall_is_the_share_found_whatever_their_order(found: int, seed: int) -> None:
    rows, queries = _made(100, seed=seed)
    ranked = np.argsort(-(queries @ rows.T), axis=1)
    truth = exact(rows, queries, 10)
    answer = np.concatenate([ranked[:, :found], ranked[:, 50 : 60 - found]], axis=1)
    np.random.default_rng(seed).shuffle(answer, axis=1)
    assert recall(rows, queries, truth, answer) == pytest.approx(found / 10)


def test_a_row_found_twice_counts_once() -> None:
    rows, queries = _made(100)
    truth = exact(rows, queries, 10)
    assert recall(rows, queries, truth, np.repeat(truth[:, :1], 10, axis=1)) == pytest.approx(0.1)


def test_what_was_not_found_is_no_row() -> None:
    rows, queries = _made(100)
    rows[-1] = queries[0]  # what -1 would be, were it taken for a position
    truth = exact(rows, queries, 10)
    assert recall(rows, queries, truth, np.full((5, 10), -1, dtype=np.int64)) == 0.0


def test_of_rows_equally_near_any_will_do() -> None:
    rows, queries = _made(20)
    twice = np.concatenate([rows, rows])
    truth = exact(twice, queries, 5)
    other = (truth + 20) % 40
    assert recall(twice, queries, truth, other) == 1.0
    assert recall(twice, queries, truth, np.concatenate([other, truth], axis=1)) == 1.0  # not more than all


def test_more_answers_than_asked_for_do_not_help() -> None:
    rows, queries = _made(100)
    ranked = np.argsort(-(queries @ rows.T), axis=1)
    truth = exact(rows, queries, 10)
    assert recall(rows, queries, truth, ranked[:, 5:25]) == pytest.approx(0.5)


def test_without_neighbours_nothing_was_missed() -> None:
    rows, queries = _made(3)
    none = np.empty((5, 0), dtype=np.int64)
    assert recall(rows[:0], queries, none, none) == 1.0


def test_short_answers_are_filled_up_with_no_row() -> None:
    np.testing.assert_array_equal(matrix([[3, 1], [], [4, 5, 6, 7]], 3), [[3, 1, -1], [-1, -1, -1], [4, 5, 6]])


@given(st.integers(1, 500), st.integers(1, 500))
def test_least_is_the_first_that_reaches(first: int, high: int) -> None:
    asked: list[int] = []

    def measure(setting: int) -> float:
        asked.append(setting)
        return 0.96 if setting >= first else 0.5

    found = least(measure, 0.95, 1, high)
    assert found.reached is (first <= high)
    assert found.setting == min(first, high)
    assert found.recall == (0.96 if found.reached else 0.5)
    assert len(asked) == len(set(asked)) <= 11  # halved, and nothing measured twice


def test_least_share_comes_close_from_above() -> None:
    found = least_share(lambda share: share, 0.95)
    assert found.reached
    assert 0.95 <= found.setting < 0.96
    assert least_share(lambda share: 0.5 * share, 0.95).reached is False
    assert least_share(lambda share: share, 1.0).setting == 1.0
