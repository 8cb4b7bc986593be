"""The last moments of a store: the newest that fits is found, and none is kept that may not be shown any more."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.cluster import moments as moments_module
from headrace.cluster.moments import Moments
from headrace.gpu.segments import SegmentView, View


def view_of(stamp: int, moved: int) -> View:
    return View((), {0: stamp}, 0, {0: moved} if moved else {})


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_newest_moment_that_has_taken_nothing_away_behind_the_cut_is_found() -> None:
    moments = Moments(Clock())
    views = [view_of(3, 0), view_of(5, 5), view_of(7, 5), view_of(9, 9)]
    for view in views:
        moments.note(view)
    assert moments.before({0: 9}, {}) is views[3]
    assert moments.before({0: 8}, {}) is views[2]
    assert moments.before({0: 5}, {0: 7}) is views[2]
    assert moments.before({0: 5}, {0: 8}) is None, "it had not been applied yet"
    assert moments.before({}, {}) is views[0]


def test_few_are_kept_and_young_ones_only() -> None:
    clock = Clock()
    moments = Moments(clock)
    for number in range(1, 101):
        moments.note(view_of(number, number))
    assert len(moments) == 32
    assert moments.before({0: 68}, {}) is None
    assert moments.before({0: 69}, {}) is not None
    clock.now = 1.0
    moments.tidy()
    assert not len(moments)


def test_marks_that_only_kept_views_have_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments_module, "_BYTES", 10_000)
    moments, cells = Moments(Clock()), np.zeros(1000, dtype=np.int32)
    for number in range(1, 31):
        alive = np.ones(1000, dtype=np.bool_)  # a row has died: its column is copied
        part = SegmentView(None, alive, cells, 1000)  # type: ignore[arg-type]
        moments.note(View((part,), {0: number}, 1000, {0: number}))
    assert len(moments) == 11, "ten copies that nobody else has, and the newest"
    for number in range(31, 41):  # nothing has died since
        moments.note(View((part,), {0: number}, 1000, {0: number}))
    assert len(moments) == 21
    moments.clear()
    moments.note(View((part,), {0: 1}, 1000, {}))
    assert len(moments) == 1
