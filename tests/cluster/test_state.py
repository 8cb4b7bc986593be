"""States, batches and rows cross the wire as plain msgpack."""

from __future__ import annotations

from typing import Any

import msgpack
import numpy as np
import pytest
from distributed.protocol import dumps, loads

from headrace.cluster.planning import adopt_codebook, attached, membership
from headrace.cluster.state import Codebook, CollectionSpec, CollectionState, Source, first_codebook
from headrace.cluster.wire import (
    batch_from_wire,
    batch_to_wire,
    floats_from_wire,
    floats_to_wire,
    offsets_from_wire,
    offsets_to_wire,
    rows_from_wire,
    rows_to_wire,
)
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.rows import Action
from headrace.gpu.store import StoredRow
from tests.gpu.batches import batch_of


def sent(message: Any) -> Any:
    """The message as a peer gets it, by Dask's own protocol; anything but plain msgpack raises."""
    msgpack.packb(message, default=None)
    return loads(dumps({"op": "headrace_test", "message": message}))["message"]


def plain(state: CollectionState) -> dict[str, Any]:
    """All of a state that compares by `==`."""
    arrays = {"codebook": None, "previous": None}
    return {name: getattr(state, name) for name in state.__slots__ if name not in arrays}


def same(left: Codebook | None, right: Codebook | None) -> bool:
    if left is None or right is None:
        return left is right
    return (
        (left.generation, left.first) == (right.generation, right.first)
        and left.centroids.dtype == right.centroids.dtype == np.float32
        and np.array_equal(left.centroids, right.centroids)
    )


def test_a_state_comes_back_as_it_was() -> None:
    index = IndexSpec(kind="ivf_pq", dtype="float16", recall_target=0.9, lists=7)
    spec = CollectionSpec("docs-ä", 3, "l2", encoder="minilm@1", cells=4, replicas=3, ids="integer", index=index)
    state = CollectionState(spec=spec, codebook=first_codebook(3), alarms=("the log was truncated",))
    states = [state]
    states.append(membership(state, ["tcp://a:1", "tcp://b:2"]))
    states.append(attached(states[-1], Source("localhost:9092", "docs", 3, "binary", {0: 0, 2: 2**40}, "id-1")))
    rng = np.random.default_rng(0)
    states.append(adopt_codebook(states[-1], rng.normal(size=(4, 3)).astype(np.float32)))
    states.append(membership(states[-1], ["tcp://b:2", "tcp://c:3"]))
    states.append(states[-1].with_(schema={"price": "float", "name": "str"}, incarnation=7))
    assert states[-1].previous is not None
    for old in states:
        new = CollectionState.from_wire(sent(old.to_wire()))
        assert plain(new) == plain(old)
        assert same(new.codebook, old.codebook)
        assert same(new.previous, old.previous)
        assert isinstance(new.alarms, tuple)
        assert all(isinstance(holders, tuple) for holders in [*new.copies.values(), *new.serving.values()])
        assert CollectionState.from_wire(sent(new.to_wire())).to_wire() == old.to_wire()


def test_a_source_of_before_topic_ids_were_kept() -> None:
    source = Source("localhost:9092", "docs", 1, "json", {0: 5})
    wire = attached(CollectionState(CollectionSpec("docs", 2), first_codebook(2)), source).to_wire()
    del wire["source"]["topic_id"]
    assert CollectionState.from_wire(sent(wire)).source == source


def test_a_big_codebook_comes_back() -> None:
    book = Codebook(3, 100, np.random.default_rng(0).normal(size=(2000, 384)).astype(np.float32))
    assert same(Codebook.from_wire(sent(book.to_wire())), book)


def test_a_batch_comes_back_as_it_was() -> None:
    batch = batch_of(
        [
            {
                "id": "a",
                "offset": 2**40,
                "partition": 3,
                "timestamp": 1_700_000_000_000,
                "attributes": {"x": 1, "y": None},
            },
            {"id": "ü", "offset": 2, "cell": -1},
            {"id": "c", "offset": 3, "cell": 5, "action": Action.KEEP},
            {"id": "d", "offset": 4, "cell": 7, "attributes": {"x": 2**63 - 1, "y": "text", "z": 0.5, "w": True}},
        ]
    )
    new = batch_from_wire(sent(batch_to_wire(batch)))
    assert list(new.ids) == batch.ids
    for name in ("topic_partitions", "offsets", "timestamps", "cells", "actions", "vectors"):
        before, after = getattr(batch, name), getattr(new, name)
        assert before.dtype == after.dtype
        np.testing.assert_array_equal(after, before)
    assert {name: list(values) for name, values in new.attributes.items()} == batch.attributes
    assert new.attributes["w"][1] is True


@pytest.mark.parametrize("ids", [[], [5, -(2**63), 2**63 - 1]])
def test_integer_ids_and_empty_batches(ids: list[int]) -> None:
    batch = batch_of([{"id": number, "offset": at, "cell": -1} for at, number in enumerate(ids)])
    new = batch_from_wire(sent(batch_to_wire(batch)))
    assert list(new.ids) == ids
    assert new.vectors.shape == (0, 8)
    assert len(new) == len(ids)


def test_rows_and_holes_come_back() -> None:
    vector = np.arange(4, dtype=np.float32)
    rows = [
        StoredRow("a", 1, 2**40, 1_700_000_000_000, 6, {"x": 1, "t": "ö"}, vector),
        None,
        StoredRow(7, 0, 0, 0, 0, {}, None),
    ]
    new = rows_from_wire(sent(rows_to_wire(rows)))
    assert new[1:] == rows[1:]
    assert new[0] is not None
    np.testing.assert_array_equal(new[0].vector, vector)
    assert (new[0].id, new[0].offset, new[0].attributes) == ("a", 2**40, {"x": 1, "t": "ö"})


@pytest.mark.parametrize("shape", [(0, 8), (3, 8), (1, 1)])
def test_floats_come_back(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    for array in (matrix, np.asfortranarray(matrix)):
        np.testing.assert_array_equal(floats_from_wire(sent(floats_to_wire(array))), matrix)


def test_offsets_come_back_with_numbers_for_keys() -> None:
    offsets = {np.int32(0): np.int64(2**40), 7: 3}
    assert offsets_from_wire(sent(offsets_to_wire(offsets))) == {0: 2**40, 7: 3}
