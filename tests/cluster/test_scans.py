"""Scans of one worker: none ends another, and none is kept for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from headrace.cluster.scans import Scans
from headrace.gpu.errors import ClusterError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def chunks(number: int) -> Iterator[Any]:
    yield [number]


def test_as_many_as_there_may_be_are_read_and_one_more_is_refused() -> None:
    scans = Scans(most=3)
    cursors = [scans.begin("w", chunks(number)) for number in range(3)]
    with pytest.raises(ClusterError, match="3 scans are under way on w"):
        scans.begin("w", chunks(3))
    assert [next(scans.chunks("w", cursor)) for cursor in cursors] == [[0], [1], [2]]
    scans.end(cursors[0])
    scans.begin("w", chunks(3))
    assert len(scans) == 3


def test_one_that_nobody_goes_on_with_makes_room_where_there_is_need() -> None:
    clock = Clock()
    scans = Scans(most=2, idle=10.0, clock=clock)
    one, other = scans.begin("w", chunks(1)), scans.begin("w", chunks(2))
    clock.now = 8.0
    scans.chunks("w", other)
    clock.now = 11.0
    assert next(scans.chunks("w", one)) == [1], "there was no need"
    with pytest.raises(ClusterError, match="under way"):
        scans.begin("w", chunks(3))
    clock.now = 18.5
    scans.begin("w", chunks(3))
    with pytest.raises(ClusterError, match=f"the scan {other} is not known to w any more"):
        scans.chunks("w", other)
    assert next(scans.chunks("w", one), "read already") == "read already"


def test_ending_twice_changes_nothing() -> None:
    scans = Scans()
    cursor = scans.begin("w", chunks(1))
    scans.end(cursor)
    scans.end(cursor)
    assert len(scans) == 0
