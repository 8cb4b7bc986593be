"""What is right about an id, and what each worker must be told to have it. Pure.

The log is right. Where it no longer reaches back far enough, the highest version that any copy knows is, and a deletion
counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headrace.cluster.compare import Heard, newest
from headrace.cluster.fanout import Header, batch_of_rows, held_by
from headrace.cluster.state import CollectionState
from headrace.gpu.rows import DELETED, Action, Batch
from headrace.gpu.versions import Versions

__all__ = ["Told", "batch_of", "header_without_rows", "no_longer_in_the_log", "told"]

_NEVER = -1
"""Offset of the deletion that is remembered of an id which the log has never had: older than any record."""

_NO_VERSION = Heard(0, -2, -2, DELETED)


@dataclass(frozen=True, slots=True)
class Told:
    """One row of what a worker is told: the header's row, what to do with it, and the wrong version that gives way."""

    row: int
    action: Action
    instead: Heard


def no_longer_in_the_log(heard: Sequence[Heard | None], begins: Mapping[int, int]) -> Heard | None:
    """The highest version known that lies below where the log begins now, and so cannot be looked up; None if the
    log would have it.
    """
    return newest([one for one in heard if one is not None and one.offset < begins.get(one.topic_partition, 0)])


def told(
    header: Header,
    worker: str,
    heard: Sequence[Heard | None],
    anew: Sequence[bool],
    ends: Mapping[int, int],
    state: CollectionState,
) -> list[Told]:
    """What `worker` must be told so that it has the header's rows, and nothing that it has already.

    Parameters
    ----------
    header : Header
        Rightful records. A deletion at offset -1 stands for an id that the log does not have at all.
    heard : sequence of Heard or None, (n,)
        What the worker knows of each.
    anew : sequence of bool, (n,)
        Send the vector even to who has the row at this version: its content is in doubt.
    ends : mapping of int to int
        Where the log ends.
    """
    holds = held_by(header, worker, state).tolist()
    found = []
    for row, (one, mine, again) in enumerate(zip(heard, holds, anew, strict=True)):
        right = Heard(
            int(header.topic_partitions[row]),
            int(header.offsets[row]),
            int(header.timestamps[row]),
            int(header.cells[row]) if mine else DELETED,
        )
        if one is None:
            if mine:
                found.append(Told(row, Action.HOLD, _NO_VERSION))
        elif mine:
            if again or not (one.same_version(right) and one.cell == right.cell):
                found.append(Told(row, Action.HOLD, one))
        elif one.live or (one.newer_than(right) and (right.offset != _NEVER or _beyond(one, ends))):
            # A remembered version that is too high would refuse the records to come.
            found.append(Told(row, Action.DROP, one))
    return found


def _beyond(one: Heard, ends: Mapping[int, int]) -> bool:
    return one.offset >= ends.get(one.topic_partition, 0)


def batch_of(header: Header, rows: Sequence[Told]) -> Batch:
    """The rows as one batch that mends."""
    gives_way = Versions(
        np.array([one.instead.topic_partition for one in rows], dtype=np.int32),
        np.array([one.instead.offset for one in rows], dtype=np.int64),
        np.array([one.instead.timestamp for one in rows], dtype=np.int64),
    )
    at = np.array([one.row for one in rows], dtype=np.int64)
    return batch_of_rows(header, at, np.array([one.action for one in rows], dtype=np.uint8), gives_way)


def header_without_rows(ids: Sequence[Any], versions: Sequence[Heard | None], dim: int) -> Header:
    """Deletions at these versions; None: the log has never had the id."""
    known = [Heard(0, _NEVER, _NEVER, DELETED) if one is None else one for one in versions]
    return Header(
        ids=list(ids),
        topic_partitions=np.array([one.topic_partition for one in known], dtype=np.int32),
        offsets=np.array([one.offset for one in known], dtype=np.int64),
        timestamps=np.array([one.timestamp for one in known], dtype=np.int64),
        cells=np.full(len(known), DELETED, dtype=np.int32),
        vectors=np.empty((0, dim), dtype=np.float32),
        vector_at=np.zeros(len(known), dtype=np.int64),
        attributes={},
    )
