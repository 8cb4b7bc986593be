"""The merge policy by itself."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.errors import ConfigError
from headrace.gpu.merge import MergePolicy, SegmentSize, base, make_room, plan, settle, written

POLICY = MergePolicy(fan_in=3, tier=4.0, floor_rows=1, dead_share=0.3, max_rows=1000)


def full(*rows: int) -> list[SegmentSize]:
    return [SegmentSize(count, count, job_bytes=10 * count) for count in rows]


def frozen(*rows: int) -> list[SegmentSize]:
    return [SegmentSize(count, count, frozen=True, job_bytes=10 * count) for count in rows]


def test_nothing_to_do() -> None:
    assert plan([], POLICY) == []
    assert plan(full(10, 10), POLICY) == []


def test_what_waits_for_its_index_comes_first_all_of_it_together() -> None:
    assert plan([SegmentSize(10, 1), *full(100, 100, 100), *frozen(10)], POLICY) == [4]
    assert plan([*full(100), *frozen(10), *full(100), *frozen(20)], POLICY) == [1, 3]
    assert plan(frozen(10, 100, 10, 100, 10, 100, 10), POLICY) == [0, 2, 4, 6], "with the rest of its tier"
    assert plan(frozen(500, 400, 200), POLICY) == [0, 1], "no more than makes a segment of the largest size"
    assert plan(frozen(2000), POLICY) == [0], "however large it is"
    assert plan([SegmentSize(10, 0, frozen=True)], POLICY) == [0]


def test_what_waits_goes_straight_into_its_tier() -> None:
    assert plan([*full(300, 300, 10, 10), *frozen(10)], POLICY) == [2, 3, 4]
    assert plan([*full(300, 300, 10), *frozen(10)], POLICY) == [3]


def able(rows: int, live: int | None = None) -> SegmentSize:
    live = rows if live is None else live
    return SegmentSize(rows, live, job_bytes=10 * live, extends=True)


def test_what_waits_is_added_to_the_smallest_segment_that_can_take_it_in() -> None:
    assert plan([able(100), able(50), *frozen(10)], POLICY) == [1, 2]
    assert plan([*full(50), able(100), *frozen(10, 20)], POLICY) == [1, 2, 3]
    assert plan([able(161), *frozen(10)], POLICY) == [1], "it has more than 16 times the rows"
    assert plan([able(161), *frozen(10, 10)], POLICY) == [0, 1, 2]
    assert plan([able(100, 79), *frozen(10)], POLICY) == [1], "too many of its rows are dead"
    assert plan([able(995), *frozen(90)], POLICY) == [1], "they would be too many"
    assert plan([able(100), *frozen(10)], POLICY, 1099) == [1], "there is no room for both"
    assert plan([able(100), *frozen(10, 20)], POLICY, 1150) == [0, 1]
    assert plan([able(100), *frozen(10)], POLICY, None, 1099) == [1], "it could not be rewritten when room is short"
    assert plan([able(100), *frozen(10)], POLICY, 5000, 1100) == [0, 1]
    dead = SegmentSize(100, 80, job_bytes=800, copy_bytes=1000, extends=True)
    assert plan([dead, *frozen(10)], POLICY, 1099) == [1], "the dead rows are copied, too"
    assert plan([dead, *frozen(10)], POLICY, 1100) == [0, 1]
    never = MergePolicy(fan_in=3, tier=4.0, floor_rows=1, max_rows=1000, absorb=0)
    assert plan([able(100), *frozen(10)], never) == [1]


def test_of_segments_that_become_one_the_largest_is_extended() -> None:
    assert base([able(10), able(30), *full(50)], POLICY) == 1
    assert base([able(10), able(30, 23), *full(50)], POLICY) == 0
    assert base(full(10, 20), POLICY) is None
    assert base([able(10)], POLICY) is None, "by itself it is written anew, for the sake of its dead rows"
    assert written([able(30, 28), *full(50), *frozen(5)], POLICY) == 55
    assert written(full(10, 20), POLICY) == 30


def test_a_segment_with_many_dead_rows_is_rewritten_by_itself() -> None:
    assert plan([SegmentSize(10, 10), SegmentSize(10, 7)], POLICY) == []
    assert plan([SegmentSize(10, 10), SegmentSize(10, 6)], POLICY) == [1]
    assert plan([SegmentSize(0, 0), SegmentSize(10, 0)], POLICY) == [1]


def test_a_complete_tier_is_merged_smallest_first() -> None:
    assert plan(full(10, 10, 10), POLICY) == [0, 1, 2]
    assert plan(full(10, 10, 10, 20, 40), POLICY) == [0, 1, 2, 3, 4], "all of it, not only so many"
    assert plan(full(300, 10, 310, 40, 320, 12), POLICY) == [1, 3, 5]
    assert plan(full(300, 10, 310, 41, 320, 12), POLICY) == [0, 2, 4], "41 is more than four times 10"


def test_small_segments_are_of_one_tier_however_much_they_differ() -> None:
    policy = MergePolicy(fan_in=3, floor_rows=64)
    assert plan(full(1, 10, 64), policy) == [0, 1, 2]
    assert plan(full(1, 10, 64), MergePolicy(fan_in=3, floor_rows=1)) == []


def test_no_merge_makes_a_segment_larger_than_the_largest() -> None:
    assert plan(full(333, 333, 334), POLICY) == [0, 1, 2]
    assert plan(full(333, 334, 334), POLICY) == []
    assert plan(full(2000, 2000, 2000), POLICY) == []


def test_nothing_is_planned_that_there_is_no_room_for() -> None:
    assert plan(full(10, 10, 10), POLICY, 300) == [0, 1, 2]
    assert plan(full(10, 10, 10), POLICY, 299) == []
    assert plan(full(10, 10, 10, 10), POLICY, 350) == [0, 1, 2], "as many of a tier as fit"
    assert plan(frozen(10, 20, 30), POLICY, 300) == [0, 1]
    assert plan(frozen(10, 20, 30), POLICY, 200) == [0]
    assert plan([*frozen(30), *full(1, 1, 1)], POLICY, 200) == [1, 2, 3]
    assert plan([SegmentSize(100, 50, job_bytes=500), SegmentSize(10, 5, job_bytes=50)], POLICY, 100) == [1]


def test_where_room_is_short_what_gives_back_most_for_the_work_goes_first() -> None:
    few, some = SegmentSize(100, 99, job_bytes=990, held=1000), SegmentSize(100, 80, job_bytes=800, held=1000)
    assert make_room([few, some], 0.01) == [1]
    assert make_room([few, some], 0.2) == [1]
    assert make_room([few, some], 0.21) == []
    assert make_room([few], 0.01) == [0]
    assert make_room([few, some], 0.01, room=799) == []
    assert make_room([few, some, SegmentSize(10, 0, held=100)], 0.01, room=0) == [2], "what is dead takes no work"
    fat = SegmentSize(100, 90, job_bytes=900, held=9000)
    assert make_room([some, fat], 0.01) == [1], "texts count, not only rows"
    assert make_room(full(10, 10), 0.0) == []
    assert make_room([], 0.01) == []


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1)), max_size=12),
    st.floats(0.001, 1),
    st.none() | st.integers(1, 100),
)
def test_making_room_comes_to_an_end(segments: list[tuple[int, float]], share: float, room: int | None) -> None:
    sizes = [SegmentSize(rows, int(rows * live), False, int(rows * live), rows) for rows, live in segments]
    for _ in range(len(sizes)):
        chosen = make_room(sizes, share, room)
        if not chosen:
            break
        (at,) = chosen
        live = sizes[at].live
        assert room is None or live <= room
        sizes = sizes[:at] + sizes[at + 1 :] + ([SegmentSize(live, live, False, live, live)] if live else [])
    assert make_room(sizes, share, room) == []


@pytest.mark.parametrize("wrong", [{"fan_in": 1}, {"dead_share": 0.0}, {"dead_share": 1.5}])
def test_a_policy_that_would_merge_for_ever_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} is"):
        MergePolicy(**wrong)


@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.booleans()), max_size=12),
    st.integers(2, 5),
    st.integers(1, 40),
    st.none() | st.integers(60, 500),
)
def test_maintenance_comes_to_an_end(
    segments: list[tuple[int, float, bool]], fan_in: int, floor_rows: int, room: int | None
) -> None:
    policy = MergePolicy(fan_in=fan_in, max_rows=200, floor_rows=floor_rows)
    sizes = [SegmentSize(rows, int(rows * share), frozen, int(rows * share)) for rows, share, frozen in segments]
    live = sum(size.live for size in sizes)
    for _ in range(3 * len(sizes) + 1):
        chosen = plan(sizes, policy, room)
        if not chosen:
            break
        assert len(chosen) == len(set(chosen))
        rows = sum(sizes[at].live for at in chosen)
        assert len(chosen) == 1 or rows <= policy.max_rows
        assert room is None or rows <= room
        sizes = [size for at, size in enumerate(sizes) if at not in chosen]
        sizes += [SegmentSize(rows, rows, job_bytes=rows)] if rows else []
    else:
        raise AssertionError("rewriting for ever")
    assert sum(size.live for size in sizes) == live
    assert not any(size.frozen for size in sizes)
    assert all((size.rows - size.live) / size.rows <= policy.dead_share for size in sizes)


def test_a_store_that_rests_becomes_one_segment() -> None:
    policy = MergePolicy(floor_rows=100, max_rows=1000)
    assert settle(full(500, 20, 1), policy) == [0, 1, 2]
    assert settle(full(500), policy) == [], "it is one already"
    assert settle(frozen(500), policy) == [0], "one without an index"
    assert settle(frozen(99), policy) == [], "too few for an index"
    assert settle(full(10, 20), policy) == []
    assert settle(full(600, 500), policy) == [], "too many for one segment"
    assert settle(full(500, 20), policy, room=5199) == [], "too large a job"
    assert settle(full(500, 20), policy, room=5200) == [0, 1]
    assert settle([], policy) == []
