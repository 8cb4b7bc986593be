"""How far a topic goes is asked once for everybody, and who gives up leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from headrace.gpu.errors import BrokerError
from headrace.pipeline.ends import Ends
from headrace.streams.topic_identity import Seen


class Slow(Ends):
    """Kafka, played: it answers with the number of the question, when it may."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        super().__init__("localhost:9092", "docs", {}, executor)
        self.asked, self.may_answer, self.fails = 0, threading.Event(), False

    def _latest(self) -> tuple[dict[int, int], Seen]:
        self.asked += 1
        number = self.asked
        self.may_answer.wait(10)
        if self.fails:
            raise BrokerError("away")
        return {0: number}, Seen(f"id-{number}", 1)


@pytest.fixture
def ends() -> Slow:
    return Slow(ThreadPoolExecutor(1))


async def test_many_readers_ask_twice_at_most(ends: Slow) -> None:
    first = asyncio.create_task(ends.known(0.0))
    await asyncio.sleep(0.01)
    others = [asyncio.create_task(ends.known(0.0)) for _ in range(50)]
    await asyncio.sleep(0.01)
    ends.may_answer.set()
    assert await first == {0: 1}
    # What was asked before they came may have missed what they must see.
    assert await asyncio.gather(*others) == [{0: 2}] * 50
    assert ends.asked == 2


async def test_an_answer_that_is_new_enough_is_used_again(ends: Slow) -> None:
    ends.may_answer.set()
    assert await ends.known(0.0) == {0: 1}
    assert await ends.known(60.0) == {0: 1}
    assert await ends.known(0.0) == {0: 2}
    assert ends.seen.topic_id == "id-2"


async def test_those_who_give_up_leave_nothing_behind(ends: Slow) -> None:
    ends.fails = True
    for _ in range(20):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ends.known(0.0), 0.005)
    assert ends.asked == 1
    waiting = asyncio.create_task(ends.known(0.0))
    await asyncio.sleep(0)
    ends.may_answer.set()
    with pytest.raises(BrokerError, match="away"):
        await waiting
    ends.fails = False
    began = time.monotonic()
    assert await ends.known(0.0) == {0: 2}
    assert time.monotonic() - began < 5
