"""Placement, readers and covers by themselves."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cluster.placement import assign_readers, cover, place

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
    def test_every_cell_has_its_copies_and_what_can_stay_stays(
        self, workers: list[str], replicas: int, rows: dict[int, int], before: list[str]
    ) -> None:
        cells = range(20)
        current = place(cells, before, replicas)
        placed = place(cells, workers, replicas, rows=rows, current=current)
        assert set(placed) == set(cells)
        for cell, holders in placed.items():
            assert len(holders) == len(set(holders)) == min(replicas, len(workers))
            assert set(holders) <= set(workers)
            stayed = tuple(worker for worker in current[cell] if worker in workers)
            assert holders[: len(stayed)] == stayed, "a copy that is there was moved, or speaks no longer first"
        assert placed == place(cells, workers[::-1], replicas, rows=rows, current=current), (
            "the order of workers mattered"
        )
        assert placed == place(cells, workers, replicas, rows=rows, current=placed)

    @given(st.lists(st.integers(0, 1000), min_size=24, max_size=60), st.integers(2, 6), st.integers(1, 3))
    def test_rows_are_balanced(self, sizes: list[int], count: int, replicas: int) -> None:
        rows = dict(enumerate(sizes))
        loads = load(place(rows, WORKERS[:count], replicas, rows=rows), rows)
        spread = max(loads.values()) - min(loads[worker] for worker in WORKERS[:count])
        assert spread <= 2 * (max(sizes) + 1)

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
