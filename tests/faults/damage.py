"""Damaging one copy inside a cluster of this process, behind everybody's back."""

from __future__ import annotations

from typing import Any

import numpy as np

from headrace.cluster.replica import Replica
from headrace.gpu.ids import hash_ids
from headrace.gpu.places import rows_of, serials_of
from headrace.gpu.rows import DELETED, Action, Batch
from headrace.gpu.store import Store
from headrace.gpu.versions import Versions
from headrace.pipeline.client import Database


def replicas(db: Database, name: str) -> dict[str, Replica]:
    """Worker to its replica."""
    workers = db.dask.cluster.workers.values()
    return {worker.address: worker.plugins["headrace"].replicas[name] for worker in workers}


def place_of(store: Store, row_id: Any) -> tuple[Any, int]:
    """The part of a store that has an id's row, and the row's number."""
    table = store._table
    _, places, known = table.known(hash_ids([row_id], store.ids), [row_id])
    assert known.live[0], f"{row_id!r} has no row"
    return table.parts[int(serials_of(places)[0])], int(rows_of(places)[0])


def lose(store: Store, row_id: Any, *, half: bool = False) -> None:
    """The row is gone, as if it had never come; with `half`, only from what searches see."""
    part, row = place_of(store, row_id)
    with store._table.lock:
        part.marks.kill(np.array([row]))
        if not half:
            hashes = hash_ids([row_id], store.ids)
            _, places, _ = store._table.known(hashes, [row_id])
            store._table.directory.forget(hashes, places)
        store._table.publish()


def revive(store: Store, part: Any, row: int) -> None:
    """A row that was replaced or deleted answers again."""
    with store._table.lock:
        alive = part.marks._alive.copy()
        alive[row] = True
        part.marks._alive = alive
        part.marks.live += 1
        store._table.publish()


def age(store: Store, row_id: Any, by: int) -> None:
    """The row claims another version."""
    part, row = place_of(store, row_id)
    versions = part.segment.versions
    versions.offsets[row] += by


def add(store: Store, row_id: Any, *, cell: int, offset: int, partition: int = 0) -> None:
    """A row that no record has brought."""
    vector = np.zeros((1, store.dim), dtype=np.float32)
    vector[0, 0] = 1.0
    one = np.array([1])
    store.apply(
        Batch(
            [row_id], one.astype(np.int32) * partition, one * offset, one, one.astype(np.int32) * cell,
            np.array([Action.HOLD], dtype=np.uint8), vector,
        )
    )  # fmt: skip


def remember(store: Store, row_id: Any, *, offset: int, partition: int) -> None:
    """A deletion that no record has brought."""
    one = np.array([1])
    store.apply(
        Batch(
            [row_id], one.astype(np.int32) * partition, one * offset, one, np.array([DELETED], dtype=np.int32),
            np.array([Action.DROP], dtype=np.uint8), np.empty((0, store.dim), dtype=np.float32),
        )
    )  # fmt: skip


def bend(store: Store, row_id: Any) -> None:
    """The vector has other numbers; only in a growing segment."""
    part, row = place_of(store, row_id)
    part.segment._vectors._kept._rows[row] *= -1


def relabel(store: Store, row_id: Any, cell: int) -> None:
    """The row claims another cell."""
    part, row = place_of(store, row_id)
    with store._table.lock:
        part.marks.relabel(np.array([row]), np.array([cell], dtype=np.int32))
        store._table.publish()


def double(store: Store, row_id: Any, cell: int | None = None) -> None:
    """The row stands twice, at the same version; the second one in another `cell`."""
    (row,), _ = store.get([row_id], vectors=True)
    assert row is not None
    assert row.vector is not None
    versions = Versions(*(np.array([one]) for one in (row.topic_partition, row.offset, row.timestamp)))
    table = store._table
    with table.lock:
        attributes = {name: [value] for name, value in row.attributes.items()}
        table.growing.append([row_id], hash_ids([row_id], store.ids), versions, row.vector[None], attributes)
        cells = np.array([row.cell if cell is None else cell], dtype=np.int32)
        table.parts[table.growing.serial].marks.append(cells)
        table.publish()
