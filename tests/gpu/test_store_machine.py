"""Random histories of one store against a dictionary and an exact search with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headrace.gpu.backend import resolve
from headrace.gpu.merge import MergePolicy
from headrace.gpu.rows import DELETED, Action, row_hash
from headrace.gpu.store import Store, StoreSettings
from tests.gpu.batches import batch_of, vector_of

DIM = 4
IDS = [*range(8), *map(str, range(8))]
SETTINGS = StoreSettings(
    seal_rows=6, graph_degree=8, graph_effort=64, search_effort=256, merge=MergePolicy(fan_in=2, dead_share=0.5)
)
Version = tuple[int, int, int]


def newer(left: Version, right: Version) -> bool:
    """Topic partition, offset, timestamp: by offset within a topic partition, else by time."""
    return left[1] > right[1] if left[0] == right[0] else (left[2], left[0]) > (right[2], right[0])


class StoreMachine(RuleBasedStateMachine):
    """The model: per id the newest version heard of, and its cell if the row is here."""

    def __init__(self) -> None:
        super().__init__()
        self.store = Store(resolve("host"), DIM, "cosine", SETTINGS)
        self.known: dict[Any, Version] = {}
        self.cells: dict[Any, int] = {}
        self.history: list[dict[str, Any]] = []
        self.next_offset = 0

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
                st.sampled_from(IDS), st.sampled_from([0, 0, 0, 1]), st.sampled_from([DELETED, 0, 1, 2]), st.booleans()
            ),
            min_size=1,
            max_size=6,
        )
    )
    def new_records(self, rows: list[tuple[Any, int, int, bool]]) -> None:
        batch = []
        for row_id, partition, cell, mine in rows:
            action = Action.HOLD if mine and cell != DELETED else Action.DROP
            # Time goes on with the offsets, as a broker's does: only then do three versions of two topic partitions
            # have an order at all.
            place = {"partition": partition, "offset": self.next_offset, "timestamp": self.next_offset // 3 * 2}
            self.next_offset += 1
            batch.append({"id": row_id, "cell": cell, "action": action, **place})
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
            np.testing.assert_array_equal(row.vector, vector_of(row.id, row.offset, DIM))

    @invariant()
    def get_and_digests_agree(self) -> None:
        found, stamp = self.store.get(IDS)
        assert [row and row.offset for row in found] == [
            self.known[row_id][1] if row_id in self.cells else None for row_id in IDS
        ]
        assert stamp.get(0, 0) <= self.next_offset
        sums: dict[int, tuple[int, int]] = {}
        for row_id, cell in self.cells.items():
            count, total = sums.get(cell, (0, 0))
            sums[cell] = count + 1, (total + row_hash(row_id, *self.known[row_id][:2])) % 2**64
        assert self.store.digests()[0] == sums
        assert self.store.cell_sizes() == {cell: count for cell, (count, _) in sums.items()}

    @invariant()
    def search_is_exact(self) -> None:
        live = list(self.cells)
        if not live:
            assert self.store.search(np.ones((1, DIM), dtype=np.float32), 3).rows == [[]]
            return
        matrix = np.array([vector_of(row_id, self.known[row_id][1], DIM) for row_id in live])
        found = self.store.search(matrix, 3)
        assert [rows[0].id for rows in found.rows] == live
        truth = -np.sort(-(matrix @ matrix.T), axis=1)[:, :3]
        np.testing.assert_allclose(np.array(found.scores), truth, rtol=1e-4, atol=1e-5)


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
