"""Rows on their way to other workers: who hears of them, and how what has moved is let go of."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from headrace.cluster import worker
from headrace.cluster.fanout import Header
from headrace.cluster.moving import send_on
from headrace.cluster.state import Codebook, CollectionSpec, CollectionState, first_codebook
from headrace.cluster.wire import batch_from_wire
from headrace.cluster.worker import WorkerNode
from headrace.gpu.rows import Action
from headrace.gpu.store import Applied
from tests.gpu.batches import DIM, batch_of

A, B, C = "a", "b", "c"
MOVING = CollectionState(
    CollectionSpec("docs", DIM),
    first_codebook(DIM),
    epoch=2,
    members={A: "active", B: "active", C: "joining"},
    copies={0: (A, B, C)},
    serving={0: (A, B)},
    moving=True,
)


def header(cell: int) -> Header:
    return Header(
        ids=["x", "y"],
        topic_partitions=np.zeros(2, np.int32),
        offsets=np.array([3, 4]),
        timestamps=np.zeros(2, np.int64),
        cells=np.full(2, cell, np.int32),
        vectors=np.eye(2, DIM, dtype=np.float32),
        vector_at=np.arange(2),
        attributes={"n": [1, 2]},
    )


async def sent(state: CollectionState, cell: int) -> Counter[tuple[str, str]]:
    """Who was told what of how many rows, sent by A; C lacks them."""
    told: Counter[tuple[str, str]] = Counter()

    async def call(address: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        batch = batch_from_wire(message["batch"])
        action = Action(int(batch.actions[0]))
        told[address, action.name] += len(batch)
        return {"missing": [0, 1] if address == C and action == Action.KEEP else []}

    def local(batch: Any, *_: Any) -> Applied:
        told[A, Action(int(batch.actions[0])).name] += len(batch)
        return Applied(0, 0, 0, ())

    assert await send_on(call, state, header(cell), me=A, local=local, deadline=1.0) == {}
    return told


async def test_copies_that_are_complete_hear_nothing() -> None:
    assert await sent(MOVING, 0) == {(C, "KEEP"): 2, (C, "HOLD"): 2}


async def test_a_new_number_is_told_to_all() -> None:
    book = Codebook(1, 1, np.eye(2, DIM, dtype=np.float32))
    state = MOVING.with_(
        codebook=book,
        previous=MOVING.codebook,
        copies={0: (A, B), 1: (A, C), 2: (B, C)},
        serving={0: (A, B), 1: (A, C)},
    )
    assert await sent(state, 1) == {(A, "KEEP"): 2, (C, "KEEP"): 2, (C, "HOLD"): 2}


async def test_what_others_hold_now_is_let_go_of_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Node(WorkerNode):
        async def call_scheduler(self, op: str, /, *, deadline: float = 5.0, **message: Any) -> dict[str, Any]:
            return {}

    monkeypatch.setattr(worker, "_DROP_ROWS", 8)
    node, dask = Node("host"), SimpleNamespace(address=A, handlers={})
    await node.setup(dask)
    settled = MOVING.with_(moving=False, copies={0: (A, B)}, members={A: "active", B: "active"})
    await node.adopt(settled)
    replica = node.replicas["docs"]
    replica.apply(batch_of([{"id": f"r{n}", "offset": n, "cell": n % 2} for n in range(60)]), {0: (0, 60)}, {}, 2)
    seen: list[int] = []
    let_go = replica.let_go

    def counted(at_most: int | None = None) -> int:
        seen.append(let_go(at_most))
        return seen[-1]

    monkeypatch.setattr(replica, "let_go", counted)
    await node.adopt(settled.with_(epoch=3, moving=True))
    assert seen == [0], "while rows move nobody lets go of any"
    await node.adopt(settled.with_(epoch=4))
    assert seen[1:] == [8, 8, 8, 6, 0]
    assert replica.store.cell_sizes() == {0: 30}
    assert replica.let_go() == 0
    await node.teardown(dask)
