"""Whose answer counts when a copy is slow, fails, or both do; and how long is slow."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headrace.gpu.errors import ClusterError, ConsistencyTimeout, StaleEpoch
from headrace.pipeline.hedging import Pace, hedged

FOREVER = 60.0


class Copies:
    """Two copies that answer after a time, or once the other one has been asked, with a text or an error.

    Who was asked and who was cancelled is noted.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.cancelled: list[str] = []
        self.both = asyncio.Event()

    def answering(
        self, name: str, seconds: float, error: Exception | None = None, *, after_both: bool = False
    ) -> Callable[[], Awaitable[str]]:
        async def answer() -> str:
            self.asked.append(name)
            if len(self.asked) == 2:
                self.both.set()
            try:
                if after_both:
                    await self.both.wait()
                await asyncio.sleep(seconds)
            except asyncio.CancelledError:
                self.cancelled.append(name)
                raise
            if error is not None:
                raise error
            return name

        return answer


async def test_a_quick_copy_is_asked_alone() -> None:
    copies = Copies()
    answer = await hedged(copies.answering("a", 0), copies.answering("b", 0), 5.0, lambda: True)
    assert answer == ("a", False)
    assert copies.asked == ["a"]


async def test_a_slow_copy_is_overtaken_and_let_go() -> None:
    copies = Copies()
    answer = await hedged(copies.answering("a", FOREVER), copies.answering("b", 0), 0.01, lambda: True)
    assert answer == ("b", True)
    await asyncio.sleep(0)
    assert copies.cancelled == ["a"]


async def test_the_first_may_still_win() -> None:
    copies = Copies()
    answer = await hedged(copies.answering("a", 0, after_both=True), copies.answering("b", FOREVER), 0.01, lambda: True)
    assert answer == ("a", False)
    await asyncio.sleep(0)
    assert copies.cancelled == ["b"]


async def test_no_budget_no_second_question() -> None:
    copies = Copies()
    assert await hedged(copies.answering("a", 0.05), copies.answering("b", 0), 0.01, lambda: False) == ("a", False)
    assert copies.asked == ["a"]


async def test_a_copy_that_fails_is_stood_in_for_at_once_and_without_a_budget() -> None:
    copies, dead = Copies(), ClusterError("dead")
    answer = await hedged(copies.answering("a", 0, dead), copies.answering("b", 0), FOREVER, lambda: False)
    assert answer == ("b", True)


@pytest.mark.parametrize("second", [0.0, 0.05])
async def test_one_failure_is_not_the_end(second: float) -> None:
    copies, dead = Copies(), ClusterError("dead")
    answer = await hedged(
        copies.answering("a", 0, dead, after_both=True), copies.answering("b", second), 0.01, lambda: True
    )
    assert answer == ("b", True)
    copies = Copies()
    answer = await hedged(
        copies.answering("a", 0.02, after_both=True), copies.answering("b", 0, dead), 0.01, lambda: True
    )
    assert answer == ("a", False)


async def test_if_both_fail_the_first_ones_reason_is_told() -> None:
    copies = Copies()
    with pytest.raises(ClusterError, match="one"):
        await hedged(
            copies.answering("a", 0, ClusterError("one"), after_both=True),
            copies.answering("b", 0, ClusterError("two")),
            0.01,
            lambda: True,
        )


async def test_what_another_copy_would_say_too_is_not_asked_again() -> None:
    copies, late = Copies(), ConsistencyTimeout("late")
    with pytest.raises(ConsistencyTimeout):
        await hedged(copies.answering("a", 0, late), copies.answering("b", 0), 0.01, lambda: True)
    assert copies.asked == ["a"]


@pytest.mark.parametrize("newer", ["first", "second"])
async def test_a_newer_placement_is_fetched_before_anybody_is_waited_for(newer: str) -> None:
    """Found by stopping a worker: those that were told of the newer placement went on to ask the one that hung."""
    copies, stale = Copies(), StaleEpoch("newer")
    told, hangs = copies.answering("a", 0, stale), copies.answering("b", FOREVER)
    first, second = (told, hangs) if newer == "first" else (hangs, told)
    with pytest.raises(StaleEpoch):
        await asyncio.wait_for(hedged(first, second, 0.01, lambda: True), 1.0)


async def test_nobody_else_to_ask() -> None:
    copies = Copies()
    assert await hedged(copies.answering("a", 0.03), lambda: None, 0.01, lambda: True) == ("a", False)


async def test_a_caller_that_gives_up_takes_both_along() -> None:
    copies = Copies()
    call = hedged(copies.answering("a", FOREVER), copies.answering("b", FOREVER), 0.01, lambda: True)
    caller = asyncio.ensure_future(call)
    await copies.both.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    await asyncio.sleep(0)
    assert sorted(copies.cancelled) == ["a", "b"]


def test_slow_is_learnt_and_bounded() -> None:
    pace = Pace()
    first = pace.patience
    for _ in range(100):
        pace.took(0.02)
    pace.took(3.0)  # one that stalled changes nothing
    assert pace.patience == pytest.approx(0.03)
    for seconds in (0.0001, 10.0):
        for _ in range(200):
            pace.took(seconds)
        assert 0.005 < pace.patience < 0.5
    assert 0.005 < first < 0.5


def test_few_requests_are_asked_twice() -> None:
    pace = Pace()
    while pace.may_hedge():
        pass
    twice = 0
    for _ in range(1000):
        pace.took(0.01)
        twice += pace.may_hedge()
    assert 50 <= twice <= 101
