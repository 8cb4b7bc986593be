"""Placement, readers and covers by themselves."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cluster.layout import near_order
from headrace.cluster.placement import SLACK, assign_readers, cover, place

WORKERS = [f"tcp://10.0.0.{number}:4000" for number in range(1, 7)]
some_workers = st.lists(st.sampled_from(WORKERS), unique=True, max_size=6)


def load(placed: dict[int, tuple[str, ...]], rows: dict[int, int]) -> Counter[str]:
    loads: Counter[str] = Counter()
    for cell, holders in placed.items():
        for worker in holders:
            loads[worker] += rows.get(cell, 0) + 1
    return loads


class TestPlace:
    @given(some_workers, st.integers(1, 4), st.dictionaries(st.integers(0, 30), st.integers(0, 1000)), some_workers)
    def test_every_cell_has_its_copies(
        self, workers: list[str], replicas: int, rows: dict[int, int], before: list[str]
    ) -> None:
        cells = range(20)
        current = place(cells, before, replicas)
        placed = place(cells, workers, replicas, rows=rows, current=current)
        assert set(placed) == set(cells)
        for holders in placed.values():
            assert len(holders) == len(set(holders)) == min(replicas, len(workers))
            assert set(holders) <= set(workers)
        assert placed == place(cells, workers[::-1], replicas, rows=rows, current=current), (
            "the order of workers mattered"
        )
        assert placed == place(cells, workers, replicas, rows=rows, current=placed)

    @given(st.lists(st.integers(0, 1000), min_size=24, max_size=60), st.integers(2, 6), st.integers(1, 3))
    def test_rows_are_balanced(self, sizes: list[int], count: int, replicas: int) -> None:
        rows = dict(enumerate(sizes))
        workers = WORKERS[:count]
        fresh = place(rows, workers, replicas, rows=rows)
        grown = place(rows, workers, replicas, rows=rows, current=place(rows, workers[1:], replicas))
        for placed in (fresh, grown):
            loads = load(placed, rows)
            spread = max(loads.values()) - min(loads[worker] for worker in workers)
            assert spread <= max(SLACK * loads.total() / count, 2 * (max(sizes) + 1))

    @given(st.lists(st.integers(0, 1000), min_size=24, max_size=60), st.integers(2, 5), st.integers(1, 2))
    def test_few_copies_move_for_a_worker_that_joins(self, sizes: list[int], count: int, replicas: int) -> None:
        rows = dict(enumerate(sizes))
        before = place(rows, WORKERS[:count], replicas, rows=rows)
        after = place(rows, WORKERS[: count + 1], replicas, rows=rows, current=before)
        new = WORKERS[count]
        copied = load({cell: tuple(set(after[cell]) - set(before[cell])) for cell in rows}, rows)
        fair, coarse = load(after, rows).total() / (count + 1), max(sizes) + 1
        assert copied[new] == load(after, rows)[new] <= (1 + SLACK) * fair + 2 * coarse
        assert copied.total() - copied[new] <= SLACK * fair * count + 2 * coarse, "rows were shuffled among the others"

    @given(st.integers(2, 6), st.integers(1, 3))
    def test_what_is_even_stays(self, count: int, replicas: int) -> None:
        workers = WORKERS[:count]
        current = place(range(60), workers, replicas)
        grown = {cell: 100 + cell % 7 for cell in range(60)}
        assert place(range(60), workers, replicas, rows=grown, current=current) == current

    def test_a_query_touches_few_workers(self) -> None:
        """Queries probe the 8 nearest of 96 cells on 6 workers; against cells dealt out at random."""
        rng = np.random.default_rng(5)
        centres = rng.standard_normal((12, 16))
        centroids = (np.repeat(centres, 8, axis=0) + 0.5 * rng.standard_normal((96, 16))).astype(np.float32)
        rng.shuffle(centroids)
        queries = centres[rng.integers(12, size=300)] + 0.5 * rng.standard_normal((300, 16))
        probes = np.argsort(((queries[:, None] - centroids) ** 2).sum(axis=2), axis=1)[:, :8].tolist()

        def touched(placed: Mapping[int, Sequence[str]]) -> float:
            return float(np.mean([len(cover(cells, placed, avoid=frozenset(), turn=0)) for cells in probes]))

        for replicas, most in ((1, 0.6), (2, 0.8)):
            near = place(range(96), WORKERS, replicas, near=near_order(centroids))
            dealt = {cell: tuple(rng.choice(WORKERS, replicas, replace=False)) for cell in range(96)}
            print(f"{replicas} copies, workers touched: {touched(near):.2f}, dealt at random {touched(dealt):.2f}")
            assert touched(near) < most * touched(dealt)

    def test_the_order_is_fixed_and_holds_every_centroid(self) -> None:
        centroids = np.random.default_rng(1).standard_normal((33, 5)).astype(np.float32)
        assert sorted(near_order(centroids)) == list(range(33))
        assert near_order(centroids) == near_order(centroids.copy())
        assert near_order(np.zeros((3, 2), dtype=np.float32)) == near_order(np.zeros((3, 2), dtype=np.float32))
        line = near_order(np.array([[3.0], [1], [0], [2]], dtype=np.float32))
        assert line in ([2, 1, 3, 0], [0, 3, 1, 2])

    def test_a_lost_workers_cells_are_shared_by_all_others(self) -> None:
        placed = place(range(60), WORKERS, 2)
        lost = WORKERS[0]
        partners = Counter(
            worker for holders in placed.values() if lost in holders for worker in holders if worker != lost
        )
        assert set(partners) == set(WORKERS[1:]), "copies are not scattered"
        after = place(range(60), WORKERS[1:], 2, current=placed)
        taken = Counter(worker for cell in placed for worker in after[cell] if worker not in placed[cell])
        assert sum(taken.values()) == sum(lost in holders for holders in placed.values())
        assert max(taken.values()) - min(taken[worker] for worker in WORKERS[1:]) <= 1

    def test_the_rows_decide_who_gets_more(self) -> None:
        placed = place(range(4), WORKERS[:2], 1, rows={0: 1000, 1: 10, 2: 10, 3: 10})
        assert {placed[1], placed[2], placed[3]} == {next(iter({(w,) for w in WORKERS[:2]} - {placed[0]}))}


class TestReaders:
    @given(st.integers(0, 30), some_workers, some_workers)
    def test_all_are_read_evenly_and_few_move(self, partitions: int, before: list[str], after: list[str]) -> None:
        old = assign_readers(partitions, before, {})
        new = assign_readers(partitions, after, old)
        if not after:
            assert new == {}
            return
        assert sorted(new) == list(range(partitions))
        shares = Counter(new.values())
        most, least = max(shares.values(), default=0), min(shares[worker] for worker in after)
        assert set(shares) <= set(after)
        assert most - least <= 1
        for partition, worker in old.items():
            if worker in after and new[partition] != worker:
                assert shares[worker] >= partitions // len(after), (
                    "it moved although its reader had no more than others"
                )
        kept = Counter(worker for worker in old.values() if worker in after)
        bound = -(-partitions // len(after))
        moved = sum(worker in after and new[partition] != worker for partition, worker in old.items())
        assert moved <= sum(max(0, kept[worker] - bound) for worker in after) + len(after) - 1
        assert assign_readers(partitions, after[::-1], new) == new
        assert assign_readers(partitions, after[::-1], old) == new

    def test_a_worker_that_joins_takes_its_share_and_no_more(self) -> None:
        old = assign_readers(12, WORKERS[:2], {})
        new = assign_readers(12, WORKERS[:3], old)
        assert sum(old[partition] != new[partition] for partition in old) == 4


def fewest(cells: list[int], serving: dict[int, tuple[str, ...]], avoid: frozenset[str]) -> int | None:
    for count in range(len(WORKERS) + 1):
        for chosen in itertools.combinations(set(WORKERS) - avoid, count):
            if all(set(chosen) & set(serving.get(cell, ())) for cell in cells):
                return count
    return None


class TestCover:
    @given(
        st.lists(st.frozensets(st.sampled_from(WORKERS[:4]), min_size=2, max_size=2), max_size=8),
        st.frozensets(st.sampled_from(WORKERS[:4]), max_size=1),
        st.integers(0, 100),
    )
    def test_two_copies_on_four_workers_take_the_fewest(
        self, holders: list[frozenset[str]], avoid: frozenset[str], turn: int
    ) -> None:
        serving = {cell: tuple(sorted(workers)) for cell, workers in enumerate(holders)}
        chosen = cover(serving, serving, avoid=avoid, turn=turn)
        assert len(chosen) == fewest(list(serving), serving, avoid)

    @given(
        st.dictionaries(st.integers(0, 8), some_workers.map(tuple), max_size=8),
        st.lists(st.integers(0, 8), max_size=8),
        st.frozensets(st.sampled_from(WORKERS), max_size=4),
        st.integers(0, 100),
    )
    def test_it_covers_or_is_empty_and_never_takes_the_avoided(
        self, serving: dict[int, tuple[str, ...]], cells: list[int], avoid: frozenset[str], turn: int
    ) -> None:
        chosen = cover(cells, serving, avoid=avoid, turn=turn)
        best = fewest(cells, serving, avoid)
        assert not set(chosen) & avoid
        assert len(chosen) == len(set(chosen))
        if best is None:
            assert chosen == []
            return
        assert all(set(chosen) & set(serving[cell]) for cell in cells)
        assert len(chosen) <= 2 * best
        if best == 1:
            assert len(chosen) == 1

    def test_equal_copies_take_turns(self) -> None:
        serving = {cell: tuple(WORKERS[:3]) for cell in range(5)}
        asked = Counter(cover(range(5), serving, avoid=frozenset(), turn=turn)[0] for turn in range(30))
        assert asked == dict.fromkeys(WORKERS[:3], 10)

    @pytest.mark.parametrize("serving", [{0: (WORKERS[0],)}, {0: (WORKERS[0],), 1: ()}])
    def test_a_cell_without_a_copy_cannot_be_covered(self, serving: dict[int, tuple[str, ...]]) -> None:
        assert cover([0, 1], serving, avoid=frozenset(), turn=0) == []
        assert cover([0], serving, avoid=frozenset(WORKERS[:1]), turn=0) == []
