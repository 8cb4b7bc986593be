"""Who has stopped answering is noticed, who is slow or says no is not, and nobody waits for the lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from headrace.cluster.coordinator import Coordinator
from headrace.cluster.state import CollectionSpec
from headrace.cluster.watching import silent, watch
from headrace.gpu.errors import ClusterError, CollectionNotFound
from tests.cluster.test_coordinator import QUICK, SOURCE, A, B, C, Played, settled, until

FOREVER = 60.0


async def test_one_answer_of_two_is_an_answer() -> None:
    asked: list[float] = []

    async def ask(worker: str, seconds: float) -> None:
        asked.append(seconds)
        if len(asked) == 1:
            raise ClusterError("late")

    assert await silent(ask, A, 2.0) is None
    assert asked == [2.0, 0.5]


async def test_two_questions_without_an_answer_are_silence() -> None:
    async def ask(worker: str, seconds: float) -> None:
        raise ClusterError(f"nothing within {seconds:g} s")

    assert await silent(ask, A, 2.0) == "nothing within 2 s"


async def test_to_say_no_is_to_answer() -> None:
    async def ask(worker: str, seconds: float) -> None:
        raise CollectionNotFound("not here")

    assert await silent(ask, A, 2.0) is None


async def test_one_that_hangs_keeps_nobody_from_being_asked(caplog: pytest.LogCaptureFixture) -> None:
    asked: Counter[str] = Counter()
    reported: list[tuple[str, str]] = []

    async def ask(worker: str, seconds: float) -> None:
        asked[worker] += 1
        if worker == A:
            await asyncio.sleep(FOREVER)
        if worker == B and asked[B] == 1:
            raise ValueError("a mistake")
        if worker == C:
            raise ClusterError("gone")

    watching = asyncio.ensure_future(
        watch(lambda: [A, B, C], ask, lambda *told: reported.append(told), every=0.005, patience=1.0)
    )
    await until(lambda: asked[B] > 5, "the others are asked again")
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    assert asked[A] == 1
    assert set(reported) == {(C, "gone")}
    assert "a mistake" in caplog.text


async def test_a_worker_that_hangs_leaves_though_nothing_is_written() -> None:
    played = Played()
    coordinator = Coordinator(CollectionSpec("docs", dim=2), played.call, replace(QUICK, watch=0.01, silence=0.02))
    coordinator.start({A, B, C})
    await until(settled(coordinator, A, B, C), "all three serve")
    await coordinator.attach(SOURCE)
    reader = coordinator.state.readers[0]
    others = sorted({A, B, C} - {reader})
    played.away.add(reader)
    await until(settled(coordinator, *others), "the one that hangs has left")
    assert reader not in coordinator.state.readers.values(), "nobody reads its topic partitions"
    played.away.clear()
    await until(settled(coordinator, A, B, C), "it answers and is filled again")
    assert reader in played.times("reset")
    await coordinator.close()


@pytest.mark.parametrize("lost", ["leaves", "hangs"])
async def test_a_move_is_given_up_when_a_member_is_lost(lost: str) -> None:
    """A move may take minutes, and until the next epoch writes wait for whoever is gone."""
    played = Played()

    async def hangs(message: dict[str, object]) -> dict[str, object]:
        await asyncio.sleep(FOREVER)
        raise AssertionError("nobody waits so long")

    coordinator = Coordinator(CollectionSpec("docs", dim=2), played.call, replace(QUICK, watch=0.01, silence=0.02))
    coordinator.start({A, B})
    await until(settled(coordinator, A, B), "two serve")
    played.instead[A, "move"] = played.instead[B, "move"] = hangs
    coordinator.worker_joined(C)
    await until(lambda: bool(played.times("move")), "rows are on their way")
    if lost == "leaves":
        coordinator.worker_left(B)
    else:
        played.away.add(B)
    played.instead.clear()
    await until(settled(coordinator, A, C), "the other two serve")
    await coordinator.close()
