"""Batches that are refused are sent in parts: nothing is lost, doubled, or brought into another order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.cluster.fanout import Header, Outcome
from headrace.gpu.errors import ClusterError, RecordTooLarge, StoreFull
from headrace.gpu.rows import DELETED
from headrace.pipeline.portions import Next, Portion, judge, part_of
from headrace.streams.batches import Decoded, keep_last

DIM = 2


def header_of(deleted: list[bool]) -> Header:
    """Records of which the offset, the vector and the attribute are all the record's number."""
    count = len(deleted)
    keeps = ~np.array(deleted, dtype=np.bool_)
    numbers = np.arange(count)
    return Header(
        ids=[f"r{n}" for n in range(count)],
        topic_partitions=(numbers % 3).astype(np.int32),
        offsets=numbers,
        timestamps=numbers + 1000,
        cells=np.where(keeps, 7, DELETED).astype(np.int32),
        vectors=np.repeat(numbers[keeps].astype(np.float32)[:, None], DIM, axis=1),
        vector_at=np.cumsum(keeps) - 1,
        attributes={"n": numbers.tolist()},
    )


def records(header: Header) -> list[tuple[object, ...]]:
    """A header row by row, with the vector of each record that has one."""
    rows = range(len(header.ids))
    columns = (header.topic_partitions, header.offsets, header.timestamps, header.cells)
    vectors = [header.vectors[header.vector_at[row]] if header.cells[row] != DELETED else [] for row in rows]
    return [
        (header.ids[row], *(int(column[row]) for column in columns), header.attributes["n"][row], *map(float, vector))
        for row, vector in zip(rows, vectors, strict=True)
    ]


def sent(sizes: list[int], room: int) -> tuple[list[Portion], int, int]:
    """Send records of these sizes to a worker with so much room: parts that were taken, all tries, first to wait."""
    portion, taken, tries = Portion.whole(len(sizes)), [], 0
    while True:
        tries += 1
        assert tries < 1000
        wanted = sum(sizes[portion.low : portion.high])
        answer: Outcome = () if wanted <= room else StoreFull("no room")
        match judge(portion, [(), answer]):
            case Next.GO_ON:
                room -= wanted
                taken.append(portion)
                if portion.last:
                    return taken, tries, len(sizes)
                portion = portion.after()
            case Next.HALVE:
                portion = portion.halved()
            case what:
                assert what is Next.WAIT
                return taken, tries, portion.low


@given(st.lists(st.integers(0, 9), max_size=300), st.integers(0, 1500))
def test_all_that_fits_is_taken_once_and_in_order(sizes: list[int], room: int) -> None:
    taken, tries, waits = sent(sizes, room)
    assert [row for portion in taken for row in range(portion.low, portion.high)] == list(range(waits))
    fitting = next((n for n in range(len(sizes)) if sum(sizes[: n + 1]) > room), len(sizes))
    assert waits == fitting
    assert tries <= 2 * math.log2(max(2, len(sizes))) + 3
    assert [portion.last for portion in taken] == [portion.high == len(sizes) for portion in taken]


@given(st.lists(st.booleans(), max_size=40), st.data())
def test_the_parts_are_the_batch(deleted: list[bool], data: st.DataObject) -> None:
    header = header_of(deleted)
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(deleted) - 1)), max_size=6))) if deleted else []
    cuts = [0, *(cut for cut in cuts if cut < len(deleted)), len(deleted)]
    parts = [part_of(header, Portion(len(deleted), low, high)) for low, high in itertools.pairwise(cuts)]
    assert [record for part in parts for record in records(part)] == records(header)


@given(st.lists(st.tuples(st.sampled_from("abcde"), st.booleans()), max_size=40), st.integers(0, 45))
def test_the_parts_leave_the_last_version_of_each_id(written: list[tuple[str, bool]], room: int) -> None:
    count = len(written)
    deleted = np.array([gone for _, gone in written], dtype=np.bool_)
    vector_rows = np.flatnonzero(~deleted)
    numbers = np.arange(count)
    vectors = np.zeros((len(vector_rows), DIM), dtype=np.float32)
    decoded = Decoded(numbers, [id_ for id_, _ in written], deleted, [None] * count, vectors, vector_rows, {}, {}, [])
    kept = keep_last(decoded, np.zeros(count, dtype=np.int32), numbers, numbers)
    taken, _, waits = sent([0 if gone else 1 for gone in kept.deleted.tolist()], room)
    index: dict[object, int] = {}
    for portion in taken:
        for row in range(portion.low, portion.high):
            assert kept.ids[row] not in index, "an id was written twice"
            index[kept.ids[row]] = int(kept.rows[row])
    last = {id_: number for number, (id_, _) in enumerate(written)}
    assert index == {id_: last[str(id_)] for id_ in kept.ids[:waits]}


def test_what_is_whole_is_not_copied() -> None:
    header = header_of([False, True, False])
    assert part_of(header, Portion.whole(3)) is header


def test_there_may_be_room_again() -> None:
    """A record that has waited is followed by two, four, eight: not one by one for ever."""
    portion, sizes = Portion(100, 10, 11), []
    while not portion.last:
        portion = portion.after()
        sizes.append(portion.size)
    assert sizes == [2, 4, 8, 16, 32, 27]


@pytest.mark.parametrize(
    ("size", "answers", "what"),
    [
        (8, [(), ()], Next.GO_ON),
        (8, [], Next.GO_ON),
        (0, [()], Next.GO_ON),
        (8, [(), StoreFull("")], Next.HALVE),
        (8, [(), RecordTooLarge("")], Next.HALVE),
        (2, [StoreFull(""), StoreFull("")], Next.HALVE),
        (1, [(), StoreFull("")], Next.WAIT),
        (1, [StoreFull(""), RecordTooLarge("")], Next.GIVE_UP),
        (1, [ClusterError(""), RecordTooLarge("")], Next.ASK),
        (8, [StoreFull(""), ClusterError("")], Next.ASK),
    ],
)
def test_what_the_answers_mean(size: int, answers: list[Outcome], what: Next) -> None:
    assert judge(Portion(20, 4, 4 + size), answers) is what
