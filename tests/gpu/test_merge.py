"""The merge policy by itself."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.merge import MergePolicy, SegmentSize, plan

POLICY = MergePolicy(fan_in=3, tier=4.0, dead_share=0.3, max_rows=1000)


def full(*rows: int) -> list[SegmentSize]:
    return [SegmentSize(count, count) for count in rows]


def test_nothing_to_do() -> None:
    assert plan([], POLICY) == []
    assert plan(full(10, 10), POLICY) == []


def test_a_frozen_segment_comes_first_and_alone() -> None:
    sizes = [SegmentSize(10, 1), *full(10, 10, 10), SegmentSize(10, 10, frozen=True)]
    assert plan(sizes, POLICY) == [4]


def test_a_segment_with_many_dead_rows_is_rewritten_by_itself() -> None:
    assert plan([SegmentSize(10, 10), SegmentSize(10, 7)], POLICY) == []
    assert plan([SegmentSize(10, 10), SegmentSize(10, 6)], POLICY) == [1]
    assert plan([SegmentSize(0, 0), SegmentSize(10, 0)], POLICY) == [1]


def test_enough_of_one_tier_are_merged_smallest_first() -> None:
    assert plan(full(10, 10, 10), POLICY) == [0, 1, 2]
    assert plan(full(300, 10, 310, 40, 320, 12), POLICY) == [1, 3, 5]
    assert plan(full(300, 10, 310, 41, 320, 12), POLICY) == [0, 2, 4], "41 is more than four times 10"


def test_no_merge_makes_a_segment_larger_than_the_largest() -> None:
    assert plan(full(333, 333, 334), POLICY) == [0, 1, 2]
    assert plan(full(333, 334, 334), POLICY) == []
    assert plan(full(2000, 2000, 2000), POLICY) == []


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 1), st.booleans()), max_size=12), st.integers(2, 5))
def test_maintenance_comes_to_an_end(segments: list[tuple[int, float, bool]], fan_in: int) -> None:
    policy = MergePolicy(fan_in=fan_in, max_rows=200)
    sizes = [SegmentSize(rows, int(rows * share), frozen) for rows, share, frozen in segments]
    live = sum(size.live for size in sizes)
    for _ in range(3 * len(sizes) + 1):
        chosen = plan(sizes, policy)
        if not chosen:
            break
        assert len(chosen) == len(set(chosen))
        rows = sum(sizes[at].live for at in chosen)
        assert len(chosen) == 1 or rows <= policy.max_rows
        sizes = [size for at, size in enumerate(sizes) if at not in chosen]
        sizes += [SegmentSize(rows, rows)] if rows else []
    else:
        raise AssertionError("rewriting for ever")
    assert sum(size.live for size in sizes) == live
    assert not any(size.frozen for size in sizes)
    assert all((size.rows - size.live) / size.rows <= policy.dead_share for size in sizes)
