"""Rows and batches as plain msgpack: columns of raw little-endian bytes and lists. Nothing is ever unpickled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from headrace.gpu.rows import Batch, Id
from headrace.gpu.store import StoredRow
from headrace.gpu.versions import Versions

__all__ = [
    "batch_from_wire",
    "batch_to_wire",
    "floats_from_wire",
    "floats_to_wire",
    "offsets_from_wire",
    "offsets_to_wire",
    "rows_from_wire",
    "rows_to_wire",
]

_COLUMNS = {"topic_partitions": "<i4", "offsets": "<i8", "timestamps": "<i8", "cells": "<i4", "actions": "u1"}
_VERSION = ("topic_partitions", "offsets", "timestamps")


def batch_to_wire(batch: Batch) -> dict[str, Any]:
    columns = {name: np.asarray(getattr(batch, name), dtype=kind).tobytes() for name, kind in _COLUMNS.items()}
    if batch.instead is not None:
        columns |= {f"instead_{name}": getattr(batch.instead, name).tobytes() for name in _VERSION}
    return columns | {
        "ids": list(batch.ids),
        "vectors": floats_to_wire(batch.vectors),
        "attributes": {name: list(values) for name, values in batch.attributes.items()},
    }


def batch_from_wire(wire: Mapping[str, Any]) -> Batch:
    columns = {name: np.frombuffer(wire[name], dtype=kind) for name, kind in _COLUMNS.items()}
    instead = None
    if "instead_offsets" in wire:
        instead = Versions(**{name: np.frombuffer(wire[f"instead_{name}"], dtype=_COLUMNS[name]) for name in _VERSION})
    return Batch(
        ids=wire["ids"],
        vectors=floats_from_wire(wire["vectors"]),
        attributes=dict(wire["attributes"]),
        instead=instead,
        **columns,
    )


def floats_to_wire(matrix: npt.NDArray[np.float32]) -> dict[str, Any]:
    """A float32 matrix as its bytes and shape."""
    return {"shape": list(matrix.shape), "bytes": np.ascontiguousarray(matrix, dtype="<f4").tobytes()}


def floats_from_wire(wire: Mapping[str, Any]) -> npt.NDArray[np.float32]:
    """Read-only view on the bytes received."""
    return np.frombuffer(wire["bytes"], dtype="<f4").reshape(wire["shape"])


def offsets_to_wire(offsets: Mapping[int, int]) -> list[list[int]]:
    """Topic partition to offset as pairs: msgpack, as Dask reads it, wants text for the keys of a map."""
    return [[int(partition), int(offset)] for partition, offset in offsets.items()]


def offsets_from_wire(wire: Sequence[Sequence[int]]) -> dict[int, int]:
    return {int(partition): int(offset) for partition, offset in wire}


def rows_to_wire(rows: Sequence[StoredRow | None]) -> list[Any]:
    return [
        row
        and [
            row.id,
            row.topic_partition,
            row.offset,
            row.timestamp,
            row.cell,
            row.attributes,
            None if row.vector is None else np.ascontiguousarray(row.vector, dtype="<f4").tobytes(),
        ]
        for row in rows
    ]


def rows_from_wire(wire: Sequence[Any]) -> list[StoredRow | None]:
    return [row and _row_from_wire(*row) for row in wire]


def _row_from_wire(
    row_id: Id,
    topic_partition: int,
    offset: int,
    timestamp: int,
    cell: int,
    attributes: Mapping[str, Any],
    vector: bytes | None,
) -> StoredRow:
    floats = None if vector is None else np.frombuffer(vector, dtype="<f4")
    return StoredRow(row_id, topic_partition, offset, timestamp, cell, dict(attributes), floats)
