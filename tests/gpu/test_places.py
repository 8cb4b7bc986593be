"""Places, marks and buffers: what a reader has taken once stays as it was, and a merge is entered piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.buffers import Buffer
from headrace.gpu.ids import hash_ids
from headrace.gpu.marks import Marks
from headrace.gpu.places import Directory, Forwarding, by_segment, places_of, rows_of, serials_of
from headrace.gpu.rows import Id

Ints = npt.NDArray[np.int64]


@given(st.lists(st.tuples(st.integers(0, 2**22), st.integers(0, 2**40 - 1))))
def test_a_place_is_a_segment_and_a_row(pairs: list[tuple[int, int]]) -> None:
    serials = np.array([serial for serial, _ in pairs], dtype=np.int64)
    rows = np.array([row for _, row in pairs], dtype=np.int64)
    places = np.array([places_of(serial, np.array([row]))[0] for serial, row in pairs], dtype=np.int64)
    assert (places >= 0).all()
    np.testing.assert_array_equal(serials_of(places), serials)
    np.testing.assert_array_equal(rows_of(places), rows)
    groups = dict(by_segment(places))
    assert sorted(groups) == sorted(set(serials.tolist()))
    for serial, positions in groups.items():
        assert (serials[positions] == serial).all()
    assert sum(map(len, groups.values())) == len(pairs)
    assert serials_of(np.array([-1])).tolist() == [-1]


class Rows:
    """Segments for a directory: serial to the ids of its rows."""

    def __init__(self) -> None:
        self.ids: dict[int, list[Id]] = {}
        self.directory = Directory(self.same)

    def same(self, serial: int, rows: Ints, ids: Sequence[Id]) -> npt.NDArray[np.bool_]:
        return np.array([self.ids[serial][row] == one for row, one in zip(rows.tolist(), ids, strict=True)], dtype=bool)

    def put(self, serial: int, ids: list[Id]) -> None:
        first = len(self.ids.setdefault(serial, []))
        self.ids[serial] += ids
        hashes = hash_ids(ids, "integer")
        entries, _ = self.directory.find(hashes, ids)
        self.directory.change(hashes, entries, places_of(serial, np.arange(first, first + len(ids))))

    def where(self, ids: list[Id]) -> list[tuple[int, int] | None]:
        _, places = self.directory.find(hash_ids(ids, "integer"), ids)
        pairs = zip(serials_of(places).tolist(), rows_of(places).tolist(), strict=True)
        return [None if serial < 0 else (serial, row) for serial, row in pairs]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 10])
def test_a_merge_is_seen_at_once_and_entered_piece_by_piece(steps: int) -> None:
    rows = Rows()
    rows.put(1, list(range(10)))
    rows.put(2, list(range(10, 20)))
    rows.put(3, [4, 12])
    merged: list[Id] = [n for n in range(20) if n not in (4, 12)]
    old = np.concatenate(
        [places_of(1, np.array([n for n in range(10) if n != 4])), places_of(2, np.array([0, 1, *range(3, 10)]))]
    )
    alive = np.ones(18, dtype=np.bool_)
    del rows.ids[1], rows.ids[2]
    rows.ids[4] = merged
    way = Forwarding(old, places_of(4, np.arange(18)), hash_ids(merged, "integer"))
    rows.directory.forward(way, lambda: alive)
    every = list(range(21))
    for step in range(steps + 1):
        expected = {row_id: (4, at) for at, row_id in enumerate(merged)} | {4: (3, 0), 12: (3, 1)}
        assert rows.where(every) == [expected.get(n) for n in every]
        if step < steps:
            rows.directory.step(5)
    # What changes meanwhile is not taken back by what is still to be entered.
    rows.put(3, [7, 19])
    alive[[merged.index(7), merged.index(19)]] = False
    rows.directory.finish()
    assert not rows.directory.step(5)
    expected = {row_id: (4, at) for at, row_id in enumerate(merged)} | {4: (3, 0), 12: (3, 1), 7: (3, 2), 19: (3, 3)}
    assert rows.where(every) == [expected.get(n) for n in every]
    assert len(rows.directory) == 20


@given(
    st.lists(st.tuples(st.sampled_from(["append", "kill", "relabel"]), st.integers(1, 400), st.randoms()), max_size=12)
)
def test_marks_once_taken_stay_as_they_were(changes: list[tuple[str, int, Any]]) -> None:
    marks = Marks()
    alive: list[bool] = []
    cells: list[int] = []
    pictures = []
    for name, count, random in changes:
        if name == "append":
            marks.append(np.full(count, count, dtype=np.int32))
            alive, cells = alive + [True] * count, cells + [count] * count
        else:
            living = [row for row, one in enumerate(alive) if one]
            rows = random.sample(living, min(count, len(living)))
            if name == "kill":
                marks.kill(np.array(rows, dtype=np.int64))
                alive = [one and row not in rows for row, one in enumerate(alive)]
            else:
                marks.relabel(np.array(rows, dtype=np.int64), np.full(len(rows), -count, dtype=np.int32))
                cells = [-count if row in rows else cell for row, cell in enumerate(cells)]
        assert (marks.alive.tolist(), marks.cells.tolist()) == (alive, cells)
        assert (len(marks), marks.live) == (len(alive), sum(alive))
        pictures.append((marks.alive, marks.cells, alive, cells))
    for taken, labels, then_alive, then_cells in pictures:
        assert (taken.tolist(), labels.tolist()) == (then_alive, then_cells)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.integers(1, 5000))
def test_a_buffer_keeps_its_slices_and_says_beforehand_what_it_will_take(sizes: list[int], expected: int) -> None:
    buffer = Buffer(np, np.int64, (2,), expected=expected)
    slices = []
    total = 0
    for size in sizes:
        growth, before = buffer.growth(size), buffer.nbytes
        buffer.append(np.arange(total, total + size)[:, None] + np.zeros(2, dtype=np.int64))
        total += size
        assert buffer.nbytes == before + growth
        assert len(buffer) == total
        slices.append((total, buffer.first()))
        assert buffer.nbytes <= 16 * max(2 * total, expected, 1024)
        if total <= expected:
            assert buffer.nbytes <= 16 * expected or expected < 1024
    for count, rows in slices:
        np.testing.assert_array_equal(rows[:, 1], np.arange(count))
    np.testing.assert_array_equal(buffer.take(np.array([total - 1, 0]))[:, 0], [total - 1, 0])
