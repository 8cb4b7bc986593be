"""Answers of several workers that do not fit together are noticed, and asked for again."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from headrace.cluster.state import Codebook, CollectionSpec, CollectionState
from headrace.cluster.wire import offsets_from_wire, offsets_to_wire
from headrace.gpu.errors import ConsistencyTimeout
from headrace.pipeline.cuts import left_behind
from headrace.pipeline.reads import Router


@pytest.mark.parametrize(
    ("answers", "behind"),
    [
        ([], {}),
        ([({0: 5}, {0: 5})], {}),
        ([({0: 1}, {0: 5})], {0: 5}),
        ([({0: 9}, {0: 5}), ({0: 5}, {})], {}),
        ([({0: 9}, {0: 5}), ({0: 4}, {})], {0: 5}),
        ([({0: 9}, {0: 5}), ({}, {})], {0: 5}),
        ([({0: 9}, {0: 5}), ({0: 7}, {0: 8})], {0: 8}),
        ([({0: 9, 1: 2}, {0: 9, 1: 2}), ({0: 9, 1: 1}, {})], {1: 2}),
    ],
)
def test_who_has_not_applied_what_took_a_row_away_elsewhere_is_behind(answers: Any, behind: dict[int, int]) -> None:
    assert left_behind(answers) == behind


class Cluster:
    """Two workers with a cell each. A row is on its way from "a" to "b", which is `late` so many times."""

    def __init__(self, late: int) -> None:
        self.late = late
        self.required: list[dict[int, int]] = []
        self.state = CollectionState(
            CollectionSpec("docs", 2),
            Codebook(1, 0, np.eye(2, dtype=np.float32)),
            epoch=3,
            members={"a": "active", "b": "active"},
            copies={0: ("a",), 1: ("b",)},
            serving={0: ("a",), 1: ("b",)},
        )

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if op == "describe":
            return {"state": self.state.to_wire(), "schema": {}, "alarms": []}
        required = offsets_from_wire(message["required"])
        self.required.append(required)
        if address == "a":
            return {"applied": offsets_to_wire({0: 8}), "moved": offsets_to_wire({0: 8}), "rows": []}
        self.late -= 1
        if self.late >= 0:
            if required.get(0, 0) > 7:
                await asyncio.sleep(min(0.01, message["deadline_s"]))
                raise ConsistencyTimeout("0: 7 of 8")
            return {"applied": offsets_to_wire({0: 7}), "moved": [], "rows": []}
        return {"applied": offsets_to_wire({0: 8}), "moved": [], "rows": ["it"]}


async def test_a_row_on_its_way_is_asked_for_again() -> None:
    cluster = Cluster(late=1)
    router = Router("docs", cluster.call, "scheduler")
    answers = await router.ask_cover("get", 5.0, {0: 3, 1: 2})
    assert [answer["rows"] for answer in answers] in ([[], ["it"]], [["it"], []])
    assert cluster.required == [{0: 3, 1: 2}] * 2 + [{0: 8, 1: 2}] * 2


async def test_who_does_not_want_to_wait_is_answered_all_the_same() -> None:
    answers = await Router("docs", Cluster(late=99).call, "scheduler").ask_cover("get", 5.0, {}, waits=False)
    assert sorted(answer["applied"] for answer in answers) == [[[0, 7]], [[0, 8]]]


async def test_who_waits_is_told_when_the_time_is_over() -> None:
    with pytest.raises(ConsistencyTimeout, match="7 of 8"):
        await Router("docs", Cluster(late=99).call, "scheduler").ask_cover("get", 0.2, {})


class Ahead(Cluster):
    """ "a" has always taken away a row that "b" has not taken in yet, but keeps so many of its last moments."""

    def __init__(self, kept: int) -> None:
        super().__init__(late=0)
        self.kept = kept
        self.asked: list[tuple[str, int | None]] = []
        self.applied = 7

    async def call(self, address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        if op == "describe":
            return await super().call(address, op, deadline=deadline, **message)
        cut = offsets_from_wire(message["cut"]).get(0) if "cut" in message else None
        self.asked.append((address, cut))
        if needed := offsets_from_wire(message["required"]):  # waited for, "b" is as far
            return {"applied": offsets_to_wire(needed), "moved": offsets_to_wire(needed), "rows": [], "from": address}
        self.applied += 2
        now = self.applied + (10 if address == "a" else 0)
        at = now if cut is None or cut < now - self.kept else min(now, cut)
        return {"applied": [[0, at]], "moved": [[0, at]] if address == "a" else [], "rows": [], "from": address}


async def test_who_is_ahead_answers_from_the_moment_when_it_was_not() -> None:
    """Nobody waits: the other one would never be as far."""
    cluster = Ahead(kept=20)
    answers = await Router("docs", cluster.call, "scheduler").ask_cover("search", 5.0, {})
    cut = min(answer["applied"][0][1] for answer in answers)
    assert sorted(cluster.asked, key=str) == [("a", cut), ("a", None), ("b", None)]
    assert not left_behind([(dict(answer["applied"]), dict(answer["moved"])) for answer in answers])


async def test_where_the_moment_is_kept_no_longer_all_are_asked_again() -> None:
    cluster = Ahead(kept=0)
    answers = await Router("docs", cluster.call, "scheduler").ask_cover("search", 5.0, {}, waits=False)
    assert [worker for worker, cut in cluster.asked[:5] if cut is None].count("b") == 2
    assert len(answers) == 2


async def test_answers_that_lack_nothing_need_not_fit_together() -> None:
    cluster = Ahead(kept=20)
    router = Router("docs", cluster.call, "scheduler")
    await router.ask_cover("search", 5.0, {}, complete=lambda answers: len(answers) == 2)
    assert sorted(cluster.asked, key=str) == [("a", None), ("b", None)]
