"""Batches for a store, from short lists; vectors that each id can be found again by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headrace.gpu.rows import DELETED, Action, Batch

DIM = 8


def vector_of(row_id: Any, offset: int = 0, dim: int = DIM) -> np.ndarray:
    """A unit vector that belongs to this id and version alone."""
    seed = [len(str(row_id)), *str(row_id).encode("utf-8", "surrogatepass"), offset]
    vector = np.random.default_rng(seed).normal(size=dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


def batch_of(rows: Sequence[dict[str, Any]], dim: int = DIM) -> Batch:
    """Rows as ``{"id", "offset", "partition", "timestamp", "cell", "action", "attributes"}``, most of them optional.

    The action is HOLD, and DROP where the cell is `DELETED`.
    """
    cells = [row.get("cell", 0) for row in rows]
    actions = [
        row.get("action", Action.DROP if cell == DELETED else Action.HOLD)
        for row, cell in zip(rows, cells, strict=True)
    ]
    held = [row for row, action in zip(rows, actions, strict=True) if action == Action.HOLD]
    names = sorted({name for row in held for name in row.get("attributes", {})})
    return Batch(
        ids=[row["id"] for row in rows],
        topic_partitions=np.array([row.get("partition", 0) for row in rows], dtype=np.int32),
        offsets=np.array([row["offset"] for row in rows], dtype=np.int64),
        timestamps=np.array([row.get("timestamp", row["offset"]) for row in rows], dtype=np.int64),
        cells=np.array(cells, dtype=np.int32),
        actions=np.array(actions, dtype=np.uint8),
        vectors=np.array([vector_of(row["id"], row["offset"], dim) for row in held], dtype=np.float32).reshape(-1, dim),
        attributes={name: [row.get("attributes", {}).get(name) for row in held] for name in names},
    )
