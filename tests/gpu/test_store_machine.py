"""Random histories of one store against a dictionary and an exact search with NumPy."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from headrace.gpu import remembered
from headrace.gpu.backend import resolve
from headrace.gpu.filters import parse
from headrace.gpu.ids import hash_ids, row_digests
from headrace.gpu.index_spec import IndexSpec
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED, Action
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import batch_of, vector_of

DIM = 4
SETTINGS = StoreSettings(seal_rows=6, merge=MergePolicy(fan_in=2, tier=4.0, floor_rows=1, dead_share=0.5))
FEW = parse("n < 2 or n is None", {"n": "int"})
Version = tuple[int, int, int]


def newer(left: Version, right: Version) -> bool:
    """Topic partition, offset, timestamp: by offset within a topic partition, else by time."""
    return left[1] > right[1] if left[0] == right[0] else (left[2], left[0]) > (right[2], right[0])


def attributes_of(offset: int) -> dict[str, Any]:
    """What a record has depends on its offset: columns come and go."""
    return {} if offset % 4 == 0 else {"n": offset % 3} if offset % 4 == 1 else {"n": offset % 3, f"t{offset % 2}": "x"}


class StoreMachine(RuleBasedStateMachine):
    """The model: per id the newest version heard of, and its cell if the row is here."""

    index = IndexSpec()
    ids = "string"

    def __init__(self) -> None:
        super().__init__()
        # So that a handful of deletions is enough for forgetting and for tidying up after it.
        self.patch = mock.patch.object(remembered, "_FEW", 2)
        self.patch.start()
        self.store = Store(resolve("host"), DIM, "cosine", SETTINGS, index=self.index, ids=self.ids)
        self.names: list[Any] = [*range(8)] if self.ids == "integer" else [f"id-{n}" for n in range(8)]
        self.known: dict[Any, Version] = {}
        self.cells: dict[Any, int] = {}
        self.history: list[dict[str, Any]] = []
        self.next_offset = 0

    def teardown(self) -> None:
        self.patch.stop()

    def vector(self, row_id: Any) -> np.ndarray:
        return vector_of(row_id, self.known[row_id][1], DIM).astype(self.index.dtype).astype(np.float32)

    def send(self, rows: list[dict[str, Any]]) -> None:
        rows = list({row["id"]: row for row in rows}.values())
        missing, inserted, removed = [], 0, 0
        for at, row in enumerate(rows):
            row_id, action, version = row["id"], row["action"], (row["partition"], row["offset"], row["timestamp"])
            known = self.known.get(row_id)
            if known is not None and newer(known, version):
                continue
            if known == version and row_id in self.cells and action != Action.DROP:
                self.cells[row_id] = row["cell"]
            elif action == Action.KEEP:
                missing.append(at)
            else:
                self.known[row_id] = version
                removed += self.cells.pop(row_id, None) is not None
                if action == Action.HOLD:
                    self.cells[row_id] = row["cell"]
                    inserted += 1
        applied = self.store.apply(batch_of(rows, DIM), {0: self.next_offset})
        assert (applied.inserted, applied.removed, applied.missing) == (inserted, removed, tuple(missing))

    @rule(
        rows=st.lists(
            st.tuples(
                st.integers(0, 7), st.sampled_from([0, 0, 0, 1]), st.sampled_from([DELETED, 0, 1, 2]), st.booleans()
            ),
            min_size=1,
            max_size=6,
        )
    )
    def new_records(self, rows: list[tuple[int, int, int, bool]]) -> None:
        batch = []
        for number, partition, cell, mine in rows:
            action = Action.HOLD if mine and cell != DELETED else Action.DROP
            # Time goes on with the offsets, as a broker's does: only then do three versions of two topic partitions
            # have an order at all.
            place = {"partition": partition, "offset": self.next_offset, "timestamp": self.next_offset // 3 * 2}
            attributes = attributes_of(self.next_offset)
            self.next_offset += 1
            batch.append({"id": self.names[number], "cell": cell, "action": action, "attributes": attributes, **place})
        self.history += batch
        self.send(batch)

    @precondition(lambda self: self.history)
    @rule(data=st.data())
    def delivered_again(self, data: st.DataObject) -> None:
        self.send(data.draw(st.lists(st.sampled_from(self.history), min_size=1, max_size=6)))

    @precondition(lambda self: self.history)
    @rule(data=st.data(), cell=st.integers(0, 5), action=st.sampled_from([Action.KEEP, Action.HOLD, Action.DROP]))
    def moved(self, data: st.DataObject, cell: int, action: Action) -> None:
        rows = data.draw(st.lists(st.sampled_from(self.history), min_size=1, max_size=6))
        self.send([{**row, "cell": cell, "action": action} for row in rows if row["cell"] != DELETED])

    @rule(keep=st.frozensets(st.integers(0, 5)))
    def drop_cells(self, keep: frozenset[int]) -> None:
        lost = [row_id for row_id, cell in self.cells.items() if cell not in keep]
        assert self.store.drop_cells(keep) == len(lost)
        for row_id in lost:
            del self.cells[row_id]

    @rule(stable=st.dictionaries(st.integers(0, 2), st.integers(0, 40)))
    def forget(self, stable: dict[int, int]) -> None:
        before = self.store.statistics()["remembered"]
        self.store.forget(stable)
        old = [i for i, (tp, offset, _) in self.known.items() if i not in self.cells and offset < stable.get(tp, 0)]
        left = self.store.statistics()["remembered"]
        assert left in (before, before - len(old))
        if left < before:
            for row_id in old:
                del self.known[row_id]

    @rule()
    def maintain(self) -> None:
        wanted = self.store.wants_maintenance()
        assert self.store.maintain() == wanted

    @invariant()
    def holds_the_same_rows(self) -> None:
        rows = [row for chunk in self.store.scan(vectors=True) for row in chunk]
        assert len(rows) == len(self.cells) == self.store.view.rows
        found = {row.id: ((row.topic_partition, row.offset, row.timestamp), row.cell) for row in rows}
        assert found == {row_id: (self.known[row_id], cell) for row_id, cell in self.cells.items()}
        for row in rows:
            np.testing.assert_array_equal(row.vector, self.vector(row.id))
            assert row.attributes == attributes_of(row.offset)
        assert self.store.statistics()["remembered"] == len(self.known) - len(self.cells)

    @invariant()
    def get_and_digests_agree(self) -> None:
        found, view = self.store.get(self.names)
        assert [row and row.offset for row in found] == [
            self.known[row_id][1] if row_id in self.cells else None for row_id in self.names
        ]
        assert view.stamp.get(0, 0) <= self.next_offset
        sums: dict[int, tuple[int, int]] = {}
        for row_id, cell in self.cells.items():
            count, total = sums.get(cell, (0, 0))
            partition, offset, _ = self.known[row_id]
            [value] = row_digests(hash_ids([row_id], self.ids), np.array([partition], np.int32), np.array([offset]))
            sums[cell] = count + 1, (total + int(value)) % 2**64
        assert self.store.digests()[0] == sums
        assert self.store.cell_sizes() == {cell: count for cell, (count, _) in sums.items()}

    @invariant()
    def search_is_exact(self) -> None:
        live = list(self.cells)
        if not live:
            assert self.store.search(np.ones((1, DIM), dtype=np.float32), 3).rows == [[]]
            return
        matrix = np.array([self.vector(row_id) for row_id in live])
        found = self.store.search(matrix, 3)
        truth = -np.sort(-(matrix @ matrix.T), axis=1)[:, :3]
        np.testing.assert_allclose(np.array(found.scores), truth, rtol=1e-4, atol=1e-5)
        assert [rows[0].id for rows in found.rows] == live

    @invariant()
    def a_filter_and_cells_leave_the_right_rows(self) -> None:
        live = [
            row_id
            for row_id, cell in self.cells.items()
            if cell in (0, 2) and attributes_of(self.known[row_id][1]).get("n", 0) < 2
        ]
        query = np.ones((1, DIM), dtype=np.float32)
        [rows] = self.store.search(query, 8, where=FEW, cells=frozenset([0, 2])).rows
        assert {row.id for row in rows} == set(live)
        assert len(rows) == len(live)


@pytest.mark.parametrize(
    ("kind", "dtype", "ids"),
    [
        ("flat", "float32", "string"),
        ("flat", "float16", "integer"),
        ("graph", "float32", "integer"),
        ("graph", "float16", "string"),
        ("ivf_pq", "float32", "integer"),
        ("ivf_pq", "float16", "string"),
    ],
)
def test_a_store_is_a_dictionary(kind: str, dtype: str, ids: str) -> None:
    class Machine(StoreMachine):
        pass

    Machine.index, Machine.ids = IndexSpec(kind, dtype, graph_degree=8, graph_effort=64), ids
    run_state_machine_as_test(Machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))
