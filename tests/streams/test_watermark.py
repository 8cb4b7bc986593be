"""Intervals, watermarks and commits against plain Python sets."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from headrace.streams.watermark import Intervals, OffsetTracker, Watermark

RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=30)


@given(RANGES, st.tuples(st.integers(-5, 70), st.integers(-5, 70)))
def test_intervals_are_a_set(ranges, asked):
    intervals, model = Intervals(), set()
    for low, high in ranges:
        intervals.add(low, high)
        model |= set(range(low, high))
    assert {n for low, high in intervals.pieces for n in range(low, high)} == model
    assert all(high < low for (_, high), (low, _) in pairwise(intervals.pieces))
    assert all(low < high for low, high in intervals.pieces)
    assert len(intervals) == len(intervals.pieces)
    assert intervals.covers(*asked) == (set(range(*asked)) <= model)


@given(st.integers(0, 30), RANGES, st.tuples(st.integers(0, 70), st.integers(0, 70)))
def test_watermark_is_the_first_offset_not_applied(start, ranges, asked):
    watermark, model = Watermark(start), set(range(start))
    for low, high in ranges:
        before = watermark.value
        watermark.add(low, high)
        model |= set(range(low, high))
        assert watermark.value == next(n for n in range(100) if n not in model)
        assert watermark.value >= before
        assert all(low > watermark.value for low, _ in watermark.above)
    assert watermark.covers(*asked) == (set(range(*asked)) <= model)


@given(st.integers(0, 30), RANGES, st.integers(0, 80))
def test_raise_to_fills_every_hole_below(start, ranges, offset):
    watermark, model = Watermark(start), set(range(start)) | set(range(offset))
    for low, high in ranges:
        watermark.add(low, high)
        model |= set(range(low, high))
    watermark.raise_to(offset)
    assert watermark.value == next(n for n in range(100) if n not in model)


def test_in_order_nothing_is_kept_above():
    watermark = Watermark(1_000)
    for low in range(1_000, 2_000, 10):
        watermark.add(low, low + 10)
        assert watermark.above == []
    assert watermark.value == 2_000
    assert not watermark.covers(0, 2_001)


@given(st.integers(0, 1_000_000), st.lists(st.integers(0, 5), min_size=1, max_size=12), st.randoms())
def test_commits_rise_and_never_pass_what_is_unfinished(start, lengths, random):
    """Batches follow each other and finish in any order."""
    tracker = OffsetTracker()
    tracker.start(3, start)
    bounds = [start]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    open_batches = {tracker.begin({3: batch}): batch for batch in pairwise(bounds)}
    committed = start
    for token in random.sample(sorted(open_batches), len(open_batches)):
        risen = tracker.done(token)
        del open_batches[token]
        assert tracker.done(token) == {}
        unfinished = [low for low, high in open_batches.values() if high > low]
        expected = min(unfinished, default=bounds[-1])
        assert risen == ({3: expected} if expected > committed else {})
        committed = max(committed, expected)
    assert committed == bounds[-1]
    assert tracker.under_way == 0


def test_commit_stops_at_a_hole():
    tracker = OffsetTracker()
    tracker.start(0, 10)
    assert tracker.done(tracker.begin({0: (15, 20)})) == {}
    assert tracker.done(tracker.begin({0: (10, 12)})) == {0: 12}
    assert tracker.raise_to(0, 15) == {0: 20}


def test_commit_waits_for_a_batch_delivered_again():
    tracker = OffsetTracker()
    first = tracker.begin({0: (0, 5)})
    again = tracker.begin({0: (0, 5)})
    assert tracker.done(first) == {}
    assert tracker.done(again) == {0: 5}


def test_truncation_frees_the_batches_below_it():
    tracker = OffsetTracker()
    lost = tracker.begin({0: (0, 5), 1: (0, 5)})
    assert tracker.raise_to(0, 100) == {0: 100}
    assert tracker.done(tracker.begin({0: (100, 101)})) == {0: 101}
    assert tracker.done(lost) == {1: 5}


def test_topic_partitions_that_went_away_are_not_committed():
    tracker = OffsetTracker()
    token = tracker.begin({0: (0, 5), 1: (7, 9)})
    tracker.drop([0, 4])
    assert tracker.done(token) == {1: 9}
    # Given back later, it starts from the committed offset, not from what this worker once knew.
    tracker.start(0, 2)
    assert tracker.done(tracker.begin({0: (2, 3)})) == {0: 3}


def test_restart_forgets_what_was_under_way():
    tracker = OffsetTracker()
    old = tracker.begin({0: (0, 5)})
    tracker.start(0, 50)
    assert tracker.done(old) == {}
    assert tracker.done(tracker.begin({0: (50, 51)})) == {0: 51}
