"""By which older placements a worker may still be read: only where all that they promise of it is there."""

from __future__ import annotations

import numpy as np
import pytest

from headrace.cluster.going_on import goes_on
from headrace.cluster.planning import adopt_codebook, attached, membership, settle
from headrace.cluster.state import CollectionSpec, CollectionState, Source, first_codebook

A, B, C = (f"tcp://10.0.0.{number}:4000" for number in (1, 2, 3))
ONE = CollectionSpec("docs", dim=2, cells=6, replicas=2)


def begin(*workers: str, spec: CollectionSpec = ONE) -> CollectionState:
    state = membership(CollectionState(spec=spec, codebook=first_codebook(2)), workers)
    return settle(adopt_codebook(state, np.arange(12, dtype=np.float32).reshape(6, 2)))


def test_who_is_left_goes_on_when_another_is_lost_and_made_good() -> None:
    old = begin(A, B)
    lost = membership(old, [B])
    joined = membership(lost, [B, C])
    done = settle(joined)
    assert set(done.serving[done.codebook.first]) == {B, C}
    for new in (lost, joined, done):
        assert goes_on(old, new, B)
        assert not goes_on(old, new, A)
    assert goes_on(joined, done, C), "it promised nothing before"


def test_records_from_a_topic_change_nothing_that_is_read() -> None:
    old = begin(A, B)
    assert goes_on(old, attached(old, Source("localhost:9092", "docs", 2, "json", {})), A)


def test_who_has_given_a_cell_away_does_not() -> None:
    old = begin(A, B)
    joined = membership(old, [A, B, C])
    assert joined.surplus
    assert all(goes_on(old, joined, worker) for worker in (A, B)), "it is kept until others have it"
    done = settle(joined)
    given = {worker for workers in joined.surplus.values() for worker in workers}
    assert given
    assert {worker for worker in (A, B) if not goes_on(joined, done, worker)} == given


def test_nobody_goes_on_with_another_codebook() -> None:
    old = begin(A, B)
    pending = adopt_codebook(old, np.ones((3, 2), dtype=np.float32))
    assert all(worker in pending.serving[cell] for cell in old.cells for worker in (A, B)), "all old cells are served"
    assert not any(goes_on(old, pending, worker) for worker in (A, B))
    assert not any(goes_on(pending, settle(pending), worker) for worker in (A, B))


@pytest.mark.parametrize("what", ["incarnation", "creation"])
def test_nobody_goes_on_where_all_began_anew(what: str) -> None:
    old = begin(A, B)
    other = CollectionSpec("docs", dim=2, cells=6, replicas=2, uid="another")
    new = old.with_(incarnation=1) if what == "incarnation" else begin(A, B, spec=other)
    assert not goes_on(old, new.with_(epoch=old.epoch + 1), A)
