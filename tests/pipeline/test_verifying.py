"""`verify` while records go on being applied: on two copies that are only played and apply when they like."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cluster.state import CollectionSpec, CollectionState, first_codebook
from headrace.gpu.backend import resolve
from headrace.gpu.rows import DELETED, Action, Batch
from headrace.gpu.store import Store
from headrace.pipeline import comparison, verifying
from headrace.pipeline.results import Verification
from headrace.pipeline.verifying import Verifier
from tests.faults import damage

A, B = "a", "b"
STATE = CollectionState(
    CollectionSpec("docs", dim=2, metric="l2"),
    first_codebook(2),
    epoch=3,
    members=dict.fromkeys((A, B), "active"),
    copies={0: (A, B)},
    serving={0: (A, B)},
)
Records = list[tuple[str, bool]]


class Copies:
    """Two stores, and a log of records (id, is it an upsert) that each applies as far as `moves` says.

    `moves` is asked, before each answer, how many records that copy applies now.
    """

    def __init__(self, log: Records, moves: Callable[[str, str], int]) -> None:
        self._log, self._moves = log, moves
        self.stores = {name: Store(resolve("host"), 2, "l2") for name in (A, B)}
        self.applied = dict.fromkeys((A, B), 0)

    def apply(self, worker: str, upto: int) -> None:
        for offset in range(self.applied[worker], min(upto, len(self._log))):
            row_id, upsert = self._log[offset]
            self.stores[worker].apply(
                Batch(
                    [row_id],
                    np.zeros(1, dtype=np.int32),
                    np.array([offset]),
                    np.array([offset]),
                    np.array([0 if upsert else DELETED], dtype=np.int32),
                    np.array([Action.HOLD if upsert else Action.DROP], dtype=np.uint8),
                    np.ones((int(upsert), 2), dtype=np.float32),
                ),
                {0: offset + 1},
            )
            self.applied[worker] = offset + 1

    async def call(self, worker: str, op: str, /, *, deadline: float, **message: Any) -> dict[str, Any]:
        self.apply(worker, self.applied[worker] + self._moves(worker, op))
        store = self.stores[worker]
        chunks = list(store.row_digests(frozenset([0])))
        match op:
            case "digests":
                sums = store.digests()[0]
                return {"digests": [[cell, count, str(total)] for cell, (count, total) in sums.items()]}
            case "row_digests":
                return {"digests": b"".join(chunk.digests.astype("<u8").tobytes() for chunk in chunks)}
            case "ids_of_digests":
                wanted = np.frombuffer(message["digests"], dtype="<u8")
                return {"ids": [row_id for chunk in chunks for row_id in chunk.ids(wanted)]}
            case "heard":
                for _, offset in message["required"]:
                    self.apply(worker, offset)
                heard, stamp = store.heard(message["ids"])
                return {"heard": [one and list(one) for one in heard], "applied": list(stamp.items())}
            case "drop_strays":
                return {"dropped": store.drop_strays(message["ids"])}
        return {}

    # -- as a router does it -------------------------------------------------------------------------------------------

    async def state(self, *, newest: bool = False) -> CollectionState:
        return STATE

    async def required(self, *_: object) -> Mapping[int, int]:
        return {0: len(self._log)}

    async def verify(self, *, repair: bool = False) -> Verification:
        router: Any = self
        return await Verifier(self.call, router, deep=False).verify(repair=repair, deadline=60.0)


@pytest.fixture(autouse=True, scope="module")
def hurried() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for module in (comparison, verifying):
            patch.setattr(module, "_PAUSE", 0.0)
        yield


async def test_a_copy_that_is_ahead_at_first_and_behind_afterwards_is_sound() -> None:
    """Its row is odd before and after, and in between, when all copies were asked about the id, they agreed."""
    looks = itertools.count(1)

    def moves(worker: str, op: str) -> int:
        if worker == A:
            return 0
        # At first the other lacks the record; it has it when it is asked about the id, and a newer one after that.
        return int(op == "heard" or (op == "row_digests" and next(looks) == 2))

    copies = Copies([("x", True)] * 3, moves)
    copies.apply(A, 2)
    copies.apply(B, 1)
    found = await copies.verify()
    assert copies.applied == {A: 2, B: 3}
    assert found.ok, found


@settings(max_examples=60, deadline=None)
@given(st.data())
async def test_copies_never_differ_whenever_they_apply(data: st.DataObject) -> None:
    log = data.draw(st.lists(st.tuples(st.sampled_from("xyz"), st.booleans()), min_size=1, max_size=40))
    copies = Copies(log, lambda *_: data.draw(st.integers(0, 3)))
    for worker in (A, B):
        copies.apply(worker, data.draw(st.integers(0, len(log))))
    found = await copies.verify()
    assert found.ok, found


@pytest.mark.parametrize("deleted", [True, False], ids=["deleted", "replaced"])
async def test_a_row_that_a_copy_does_not_know_of_is_told_while_records_go_on(deleted: bool) -> None:
    turns = itertools.cycle([0, 1, 2])
    copies = Copies([("x", True), ("x", not deleted), *[("y", True)] * 100], lambda *_: next(turns))
    copies.apply(A, 1)
    part, row = damage.place_of(copies.stores[A], "x")
    copies.apply(A, 2)
    damage.revive(copies.stores[A], part, row)
    copies.apply(B, 2)
    found = await copies.verify()
    assert not found.ok
    assert "does not know of" in found.differences[0]


async def test_a_row_that_stands_twice_is_found_and_mended_while_records_go_on() -> None:
    """Both at the same version: by id and version, copies are alike, and searches answer with it twice."""
    turns = itertools.cycle([0, 1, 2])
    copies = Copies([("x", True), *[("y", True)] * 200], lambda *_: next(turns))
    for worker in (A, B):
        copies.apply(worker, 2)
    damage.double(copies.stores[B], "x")
    found = await copies.verify()
    assert (found.ok, [one.id for one in found.ids]) == (False, ["x"])
    assert found.ids[0].copies == {B: "answers with two rows of it"}
    mended = await copies.verify(repair=True)
    assert (mended.ok, mended.repaired) == (True, 1), mended
    rows = [row.id for some in copies.stores[B].scan() for row in some]
    assert sorted(rows) == ["x", "y"]
