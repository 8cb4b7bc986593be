"""Queries gathered while the device is busy: who is searched with whom, in which order, and what reaches whom."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.gpu.gather import Gatherer, GatherSettings


def query(*numbers: float) -> np.ndarray:
    """Queries of one dimension, whose numbers say who asked."""
    return np.array(numbers, dtype=np.float32)[:, np.newaxis]


class Device:
    """Searches that end when the test says so; an answer is the key and the query's own number."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[float]]] = []
        self.running: list[asyncio.Future[None]] = []
        self.most_running = 0
        self.fails: set[str] = set()

    async def search(self, key: str, queries: np.ndarray) -> Sequence[tuple[str, float]]:
        self.batches.append((key, queries[:, 0].tolist()))
        end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.running.append(end)
        self.most_running = max(self.most_running, len(self.running))
        try:
            await end
        finally:
            self.running.remove(end)
        if key in self.fails:
            raise ValueError(f"no {key}")
        return [(key, number) for number in queries[:, 0].tolist()]

    async def finish(self, *, all_of_them: bool = False) -> None:
        """End the oldest search, or all that there are and will be."""
        await settled()
        while self.running:
            self.running[0].set_result(None)
            await settled()
            if not all_of_them:
                break


async def settled() -> None:
    """Whatever can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


def asking(gatherer: Gatherer[str, Any], key: str, *numbers: float) -> asyncio.Task[Any]:
    return asyncio.get_running_loop().create_task(gatherer.search(key, query(*numbers)))


async def test_a_lone_query_leaves_at_once() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1, window=60.0))
    asked = asking(gatherer, "a", 1)
    await settled()
    assert device.batches == [("a", [1])]
    await device.finish()
    assert await asked == [("a", 1)]
    # The device is free again: nor does the next one wait.
    again = asking(gatherer, "a", 2)
    await settled()
    assert device.batches[1:] == [("a", [2])]
    await device.finish()
    assert await again == [("a", 2)]


async def test_what_waits_while_the_device_is_busy_is_the_next_batch() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=2))
    asked = [asking(gatherer, "a", number) for number in range(6)]
    await settled()
    assert device.batches == [("a", [0])]
    assert gatherer.waiting == 5
    await device.finish()
    assert device.batches[1:] == [("a", [1, 2, 3, 4, 5])]
    await device.finish(all_of_them=True)
    assert [await one for one in asked] == [[("a", number)] for number in range(6)]
    assert gatherer.waiting == 0
    assert (gatherer.searches, gatherer.queries) == (2, 6)


async def test_what_cannot_be_searched_together_runs_at_the_same_time() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=2, most=4))
    asked = [asking(gatherer, key, number) for number, key in enumerate("aabbc")]
    await settled()
    assert device.batches == [("a", [0]), ("b", [2])]
    await device.finish()
    assert device.batches[2:] == [("a", [1])]  # it waited longest, and its like has just ended
    await device.finish()
    assert device.batches[3:] == [("b", [3])]
    await device.finish(all_of_them=True)
    # A call that is a batch by itself waits for none of its like, and they not for it.
    asked += [asking(gatherer, "a", 1, 2, 3, 4), asking(gatherer, "a", 5), asking(gatherer, "a", 6)]
    await settled()
    assert device.batches[5:] == [("a", [1, 2, 3, 4]), ("a", [5])]
    await device.finish(all_of_them=True)
    assert device.most_running == 2
    await asyncio.gather(*asked)


async def test_only_equal_keys_and_lengths_are_searched_together() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    first = asking(gatherer, "a", 0)
    others = [asking(gatherer, key, number) for number, key in enumerate("babab", 1)]
    longer = asyncio.ensure_future(gatherer.search("a", np.ones((1, 3), dtype=np.float32)))
    await device.finish(all_of_them=True)
    assert device.batches == [("a", [0]), ("b", [1, 3, 5]), ("a", [2, 4]), ("a", [1])]
    assert [await one for one in others] == [[(key, number)] for number, key in enumerate("babab", 1)]
    await asyncio.gather(first, longer)


async def test_a_batch_has_a_bound_and_no_key_starves() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1, most=4))
    asked = [asking(gatherer, "a", number) for number in range(11)]
    asked.append(asking(gatherer, "b", 11))
    await device.finish(all_of_them=True)
    assert device.batches == [("a", [0]), ("a", [1, 2, 3, 4]), ("b", [11]), ("a", [5, 6, 7, 8]), ("a", [9, 10])]
    await asyncio.gather(*asked)


async def test_one_call_that_brings_more_than_the_bound_is_searched_whole() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1, most=4))
    asked = [asking(gatherer, "a", 0), asking(gatherer, "a", *range(1, 10)), asking(gatherer, "a", 10)]
    await device.finish(all_of_them=True)
    assert [len(numbers) for _, numbers in device.batches] == [1, 9, 1]
    assert [len(await one) for one in asked] == [1, 9, 1]


async def test_a_bound_of_one_gathers_nothing() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1, most=1))
    asked = [asking(gatherer, "a", number) for number in range(4)]
    await device.finish(all_of_them=True)
    assert [numbers for _, numbers in device.batches] == [[0], [1], [2], [3]]
    await asyncio.gather(*asked)


async def test_an_empty_call_has_an_empty_answer() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    asked = [asking(gatherer, "a", 1), asking(gatherer, "a", 2)]
    empty = asyncio.ensure_future(gatherer.search("a", np.empty((0, 1), dtype=np.float32)))
    await device.finish(all_of_them=True)
    assert await empty == []
    assert [await one for one in asked] == [[("a", 1)], [("a", 2)]]


async def test_an_error_reaches_those_who_were_searched_together_only() -> None:
    device = Device()
    device.fails = {"bad"}
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    good = asking(gatherer, "a", 0)
    bad = [asking(gatherer, "bad", number) for number in (1, 2)]
    later = asking(gatherer, "a", 3)
    await device.finish(all_of_them=True)
    for one in bad:
        with pytest.raises(ValueError, match="no bad"):
            await one
    assert await good == [("a", 0)]
    assert await later == [("a", 3)]


async def test_an_answer_of_another_length_is_an_error() -> None:
    async def search(key: str, queries: np.ndarray) -> list[int]:
        return [1, 2, 3]

    with pytest.raises(RuntimeError, match="1 queries got 3 answers"):
        await Gatherer(search).search("a", query(1))


async def test_who_is_cancelled_while_waiting_is_not_searched_for() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    asked = [asking(gatherer, "a", number) for number in range(4)]
    await settled()
    asked[2].cancel()
    await device.finish(all_of_them=True)
    assert device.batches == [("a", [0]), ("a", [1, 3])]
    assert [await asked[number] for number in (0, 1, 3)] == [[("a", 0)], [("a", 1)], [("a", 3)]]
    assert asked[2].cancelled()


async def test_all_are_cancelled_while_waiting_and_the_device_goes_on() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    asked = [asking(gatherer, "a", number) for number in range(3)]
    await settled()
    for one in asked[1:]:
        one.cancel()
    other = asking(gatherer, "b", 9)
    await device.finish(all_of_them=True)
    assert device.batches == [("a", [0]), ("b", [9])]
    assert await other == [("b", 9)]
    await asked[0]


async def test_who_is_cancelled_while_searched_leaves_the_others_their_answers() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    asked = [asking(gatherer, "a", number) for number in range(4)]
    await device.finish()
    assert device.batches[-1] == ("a", [1, 2, 3])
    asked[1].cancel()
    await device.finish(all_of_them=True)
    assert await asked[2] == [("a", 2)]
    assert await asked[3] == [("a", 3)]


async def test_a_search_that_is_cancelled_cancels_its_callers() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1))
    asked, next_ = asking(gatherer, "a", 1), asking(gatherer, "b", 2)
    await settled()
    device.running[0].cancel()  # as an executor's work when it is shut down
    with pytest.raises(asyncio.CancelledError):
        await asked
    await device.finish()
    assert await next_ == [("b", 2)]


async def test_a_window_holds_back_what_came_while_the_device_was_busy() -> None:
    device = Device()
    gatherer = Gatherer(device.search, GatherSettings(at_once=1, window=0.05, most=3))
    asked = [asking(gatherer, "a", 0), asking(gatherer, "a", 1)]
    await device.finish()
    assert len(device.batches) == 1  # held back
    asked.append(asking(gatherer, "a", 2))
    await asyncio.sleep(0.1)
    assert device.batches[1:] == [("a", [1, 2])]
    # A full batch is not held back.
    asked += [asking(gatherer, "a", number) for number in (3, 4, 5)]
    await device.finish()
    assert device.batches[2:] == [("a", [3, 4, 5])]
    await device.finish(all_of_them=True)
    await asyncio.gather(*asked)


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.booleans(), st.booleans()), max_size=30),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_everybody_gets_the_answers_to_their_own_queries(
    calls: list[tuple[str, int, bool, bool]], at_once: int, most: int
) -> None:
    async def whole() -> None:
        device = Device()
        device.fails = {"c"}
        gatherer = Gatherer(device.search, GatherSettings(at_once=at_once, most=most))
        asked: list[tuple[asyncio.Task[Any], str, list[float], bool]] = []
        number = 0.0
        for key, count, cancelled, finish in calls:
            mine = [number + at for at in range(count)]
            number += count
            asked.append((asking(gatherer, key, *mine), key, mine, cancelled))
            await settled()
            if cancelled:
                asked[-1][0].cancel()
            if finish:
                await device.finish()
        await device.finish(all_of_them=True)
        assert device.most_running <= at_once
        for task, key, mine, cancelled in asked:
            if cancelled and task.cancelled():
                continue
            if key == "c":
                with pytest.raises(ValueError, match="no c"):
                    await task
            else:
                assert await task == [(key, one) for one in mine]
        for _, numbers in device.batches:
            assert len(numbers) <= max(most, 3)
        assert gatherer.waiting == 0

    asyncio.run(whole())
