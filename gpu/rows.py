"""What travels into a store and out of it, and what a row is: plain columns, no behaviour.

A *version* is a record's place in the log: ``(topic partition, offset)``. One id normally comes from one topic
partition, so two versions of it compare by offset; an id that arrives from two is decided by Kafka's timestamp and
counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from headrace.gpu.versions import Versions

__all__ = ["DELETED", "Action", "Applied", "Batch", "Found", "Id", "Left", "StoredRow"]

Id = str | int
"""The user's own key."""

DELETED = -1
"""The cell of a record that deletes its id."""


class Action(IntEnum):
    """What one worker is told to do with one row of a header."""

    DROP = 0  # not yours (or deleted): forget an older row, remember the version
    KEEP = 1  # yours and believed to be there already: take over the cell's new number
    HOLD = 2  # yours: the vector is attached


@dataclass(frozen=True, slots=True)
class Batch:
    """A header for one worker, with the vectors of the rows it is to hold.

    Attributes
    ----------
    ids : sequence of str or int, (n,)
    topic_partitions : int32 (n,)
    offsets : int64 (n,)
    timestamps : int64 (n,), ms since the epoch, Kafka's
    cells : int32 (n,)
        `DELETED` where the record deletes.
    actions : uint8 (n,)
        An `Action` each.
    vectors : float32 (h, dim)
        Of the rows whose action is `Action.HOLD`, in order.
    attributes : dict of str to list, each (h,)
        None where a row lacks the attribute.
    instead : Versions, optional
        Only to mend a copy: a version that is known to be wrong for each row. Where the store has exactly that one it
        gives way, however new it is, and the same version may be sent with another vector.
    """

    ids: Sequence[Id]
    topic_partitions: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    timestamps: npt.NDArray[np.int64]
    cells: npt.NDArray[np.int32]
    actions: npt.NDArray[np.uint8]
    vectors: npt.NDArray[np.float32]
    attributes: dict[str, Sequence[Any]] = field(default_factory=dict)
    instead: Versions | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply did.

    Attributes
    ----------
    inserted, removed : int
        Rows; one that was replaced counts as both.
    foreign : int
        Records decided by timestamp, because their id was known from another topic partition.
    missing : tuple of int
        Positions in the batch of the rows to send again with their vectors.
    left : tuple of Left, optional
        Rows that live elsewhere now, by segment; None where some may have gone of which nothing is known.
    """

    inserted: int
    removed: int
    foreign: int
    missing: tuple[int, ...]
    left: tuple[Left, ...] | None = field(default=(), compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Left:
    """Rows that a batch took away to other workers.

    Attributes
    ----------
    rows : int64 (n,)
        Positions in the batch.
    vectors : float32 (n, dim)
        As they were here, on the backend's device.
    """

    rows: npt.NDArray[np.int64]
    vectors: Any


class StoredRow(NamedTuple):
    """One row as it is read: by a search, by id, or in a scan; `vector` only where it was asked for.

    A tuple, because a search makes ten of them: a frozen dataclass takes six times as long to make.
    """

    id: Id
    topic_partition: int
    offset: int
    timestamp: int
    cell: int
    attributes: dict[str, Any]
    vector: npt.NDArray[np.float32] | None


@dataclass(frozen=True, slots=True)
class Found:
    """Answer to a batch of queries: for each, rows best first and their scores; and the view's stamp and `moved`."""

    rows: list[list[StoredRow]]
    scores: list[list[float]]
    stamp: Mapping[int, int]
    moved: Mapping[int, int]
